"""The script that recomputes the paper's tables, on a small network, and the page that it wrote."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from e2pass import PredictorHardware
from e2pass.models import resnet

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "paper_table.md").read_text(encoding="utf-8")
REPORTED = (
    "33.33", "38.62", "63.28", "84.64", "88.72", "92.81", "39.55 to 40.52", "46.03", "83.40", "48.34", "84.17", "88.73",
    "88.17", "61.58",
)  # fmt: skip
"""Every energy saving of the paper, in its order."""


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("paper_table", ROOT / "benchmarks" / "paper_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def net(script: ModuleType) -> Any:
    return script.Network("ResNet-8", lambda: resnet(8))


def test_smd_leaves_two_thirds_and_multiplies_with_the_rest(script: ModuleType, net: Any) -> None:
    assert net.share(("smd",)) == pytest.approx(2 / 3, rel=1e-5)
    for skip in script.SKIPS:
        assert net.share(("smd", "slu"), skip) == pytest.approx(2 / 3 * net.share(("slu",), skip), rel=1e-5)
        assert net.share(script.ALL, skip) < net.share(("smd", "slu"), skip) < net.share(("smd",))


def test_skipping_at_random_saves_the_gates(net: Any) -> None:
    report = net.report(0.4)
    gates = next(v for v in report.alone if v.techniques == ("slu",)).by_technique["slu"].energy_j
    saved = net.share(("slu",), 0.4) - net.stochastic_depth(0.4)
    assert saved == pytest.approx(gates / report.baseline.energy_j)
    assert 0 < saved < 0.1
    assert net.stochastic_depth(0.0) == pytest.approx(1.0)  # nothing skipped, nothing added


@pytest.mark.parametrize("skip", [0.1, 0.7])
def test_the_implied_skip_ratio_is_the_one_that_saves_as_much(script: ModuleType, net: Any, skip: float) -> None:
    def share(s: float) -> float:
        found: float = net.share(script.ALL, s)
        return found

    assert net.implied_skip(share, 1 - share(skip)) == pytest.approx(skip, abs=1e-4)


def test_hardware_of_the_predictor(net: Any) -> None:
    psg = ("bits", "psg")
    whole = net.share(psg, hardware=PredictorHardware(skips="tensor"))
    assert net.share(psg, hardware=PredictorHardware(reuse=True)) <= net.share(psg) < whole


def test_the_page_has_every_reported_saving_a_modelled_one_and_the_reason() -> None:
    table = re.findall(r"^\| (.+?) \| (.+?) \| ([\d. to]+) % \| (.+?) \| (.*?) \|$", PAGE, re.M)
    assert tuple(row[2] for row in table) == REPORTED
    for network, method, _, modelled, difference in table:
        assert re.search(r"\d\.\d+", modelled)
        assert re.fullmatch(r"[+-]\d+\.\d( to [+-]\d+\.\d)?", difference), (network, method)
        assert f"**{network}, {method}.**" in PAGE
    for text in ("75.0 kJ", "692 min", "modelled, not measured", "as reported"):
        assert text in PAGE
