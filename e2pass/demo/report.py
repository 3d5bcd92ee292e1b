"""The demo's result: one table over all seeds, a JSON report and a dump of the training graph."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from e2pass.backends.html import to_html
from e2pass.demo.data import Images
from e2pass.demo.train import Recipe, SeedResult
from e2pass.report import CostReport, save, si

SCHEMA = "e2pass/demo/1"

Value = Callable[[SeedResult], float]
Format = Callable[[float], str]


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _seconds(value: float) -> str:
    return f"{value:.1f} s"


def _count(value: float) -> str:
    return f"{value:.0f}"


def _joules(value: float) -> str:
    return si(value, "J")


def _time(value: float) -> str:
    return si(value, "s")


def _plain_step(key: str) -> Value:
    return lambda r: r.transformed.step[key] * r.transformed.batches_nominal


# Label, format, value of the plain run (None where it has none), value of the transformed run.
ROWS: tuple[tuple[str, Format, Value | None, Value], ...] = (
    ("test accuracy", _percent, lambda r: r.plain.accuracy, lambda r: r.transformed.accuracy),
    ("test accuracy of t.unwrap(), all blocks run", _percent, None, lambda r: r.transformed.accuracy_unwrapped),
    ("batches run", _count, lambda r: r.plain.batches, lambda r: r.transformed.batches),
    ("batches dropped", _percent, None, lambda r: r.transformed.dropped),
    ("gated energy skipped in training", _percent, None, lambda r: r.transformed.skip_ratio),
    ("gated energy skipped in the test", _percent, None, lambda r: r.transformed.skip_ratio_eval),
    ("weight gradients predicted", _percent, None, lambda r: r.transformed.predicted),
    ("predicted signs that are right", _percent, None, lambda r: r.transformed.agreement),
    ("wall-clock here", _seconds, lambda r: r.plain.seconds, lambda r: r.transformed.seconds),
    ("energy of the run (modelled)", _joules, _plain_step("baseline_energy_j"), _plain_step("transformed_energy_j")),
    ("time of the run (modelled)", _time, _plain_step("baseline_time_s"), _plain_step("transformed_time_s")),
    ("energy saved (modelled)", _percent, None, lambda r: r.transformed.saving_energy),
    ("time saved (modelled)", _percent, None, lambda r: r.transformed.saving_time),
)


def table(results: Sequence[SeedResult], images: Images, recipe: Recipe) -> Table:
    """One table: a row a quantity, two columns (plain, transformed) a seed, and their means."""
    title = f"ResNet-{recipe.depth} on {images.name}, {recipe.epochs} nominal epochs: plain SGD and {recipe.config}"
    caption = f"modelled: on the board {recipe.board}, at the rates measured in training. {images.note}".strip()
    made = Table(title=title, caption=caption)
    made.add_column("")
    columns = [(f"seed {r.seed}", [r]) for r in results]
    if len(results) > 1:
        columns.append(("mean", list(results)))
    for heading, _ in columns:
        made.add_column(f"{heading}\nplain", justify="right")
        made.add_column(f"{heading}\n{recipe.config}", justify="right")
    for label, text, plain, transformed in ROWS:
        cells = []
        for _, members in columns:
            cells += [text(_mean(plain, members)) if plain else "", text(_mean(transformed, members))]
        made.add_row(label, *cells)
    return made


def write(
    out: Path, results: Sequence[SeedResult], images: Images, recipe: Recipe, cost_report: str, graph: str
) -> list[Path]:
    """Write ``demo.json``, the cost report as JSON and as a page, and ``training_graph.txt`` into ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    texts = {
        "demo.json": json.dumps(as_dict(results, images, recipe), indent=2) + "\n",
        "cost_report.json": cost_report,
        "cost_report.html": to_html(CostReport.from_json(cost_report)),
        "training_graph.txt": graph,
    }
    for name, text in texts.items():
        save(text, out / name)
    return [out / name for name in texts]


def as_dict(results: Sequence[SeedResult], images: Images, recipe: Recipe) -> dict[str, Any]:
    """Everything in the table and what it rests on, as plain values."""
    return {
        "schema": SCHEMA,
        "data": {"name": images.name, "train": len(images.train), "test": len(images.test), "note": images.note},
        "recipe": asdict(recipe),
        "energy_and_time": "modelled, not measured; accuracy, rates and wall-clock are measured",
        "seeds": [r.to_dict() for r in results],
        "mean": {
            label: {"plain": _mean(plain, results) if plain else None, "transformed": _mean(transformed, results)}
            for label, _, plain, transformed in ROWS
        },
    }


def _mean(value: Value, results: Sequence[SeedResult]) -> float:
    return sum(map(value, results)) / len(results)
