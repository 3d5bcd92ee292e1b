"""The ablation as bars: what each technique takes off, one after the other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from e2pass.step.cost import Totals
from e2pass.step.variant import NAMES, Variant


@dataclass(frozen=True)
class Bar:
    """One technique's part of the waterfall.

    Attributes:
        technique: Name for headings.
        before: Cost of a step with the techniques before it.
        after: Cost with it as well. It may be higher: a technique that does not pay on a board is shown as such.
    """

    technique: str
    before: Totals
    after: Totals


def waterfall(baseline: Totals, stages: Iterable[Variant]) -> list[Bar]:
    """The bars between the baseline and the last stage; each begins where the one before it ends."""
    bars, before = [], baseline
    for stage in stages:
        bars.append(Bar(NAMES[stage.techniques[-1]], before, stage.totals))
        before = stage.totals
    return bars
