"""The charts of a cost report, as options of Apache ECharts: data only, no scripts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from e2pass.cost import Phase, Technique
from e2pass.report import CostReport, StepCost, pivot
from e2pass.report.bars import waterfall
from e2pass.report.cells import Cell
from e2pass.report.units import percent, si
from e2pass.step.cost import Totals
from e2pass.step.variant import NAMES as TECHNIQUE_NAMES
from e2pass.step.variant import Variant

Option = dict[str, Any]

PALETTE = ("#4e79a7", "#f28e2b", "#e15759", "#76b7b2", "#59a14f", "#edc948", "#b07aa1", "#ff9da7", "#9c755f", "#bab0ac")
COLOURS: Mapping[str, str] = {
    Phase.FORWARD.value: "#4e79a7",
    Phase.LOSS.value: "#9c755f",
    Phase.DX.value: "#f28e2b",
    Phase.DW.value: "#e15759",
    Phase.BACKWARD.value: "#76b7b2",
    Phase.UPDATE.value: "#59a14f",
    Technique.BASE.value: "#4e79a7",
    Technique.SLU.value: "#f28e2b",
    Technique.BITS.value: "#59a14f",
    Technique.PSG.value: "#b07aa1",
    "compute": "#e15759",
    "static": "#bab0ac",
}
"""The same thing has the same colour in every chart."""
TOTAL, LESS, MORE = "#4e79a7", "#59a14f", "#e15759"
NAMES = {Phase.DX.value: "dX", Phase.DW.value: "dW"}
SOFT, GRID = "var(--axis)", "var(--grid)"
"""Colours of the page's scheme, light or dark; the script looks them up."""
ROOFS = tuple(f"var(--roof-{i})" for i in range(1, 5))
ALL_LABELS = 24
"""Categories up to which every one has its label on the axis."""


@dataclass(frozen=True)
class Chart:
    """One chart.

    Attributes:
        name: Part of its element's id.
        title: Heading.
        views: ECharts options by name; the first is shown.
        units: Units of ``x``, ``y`` and ``value`` (tooltips).
        note: What one must know to read it.
        height_px: Height.
        wide: Whether it takes the whole width.
    """

    name: str
    title: str
    views: Mapping[str, Option]
    units: Mapping[str, str] = field(default_factory=lambda: {"x": "", "y": "J", "value": "J"})
    note: str = ""
    height_px: int = 320
    wide: bool = False

    def data(self) -> dict[str, Any]:
        """What the script needs."""
        return {"views": dict(self.views), "units": dict(self.units)}


def charts(report: CostReport) -> Iterator[Chart]:
    """Yield the charts that the report has data for."""
    if report.stages:
        yield _waterfall(report)
        yield _alone(report)
    yield _composition(report)
    yield _roofline(report)
    yield _layers(report)


def _waterfall(report: CostReport) -> Chart:
    base = report.baseline.energy_j
    bars = waterfall(report.baseline.totals, report.stages)
    floors, heights = [0.0], [_bar(base, TOTAL, si(base, "J"))]
    for bar in bars:
        before, after = bar.before.energy_j, bar.after.energy_j
        floors.append(min(before, after))
        change = (after - before) / base if base else 0.0
        sign = "+" if change > 0 else "\N{MINUS SIGN}"
        label = f"{sign}{percent(abs(change))}"
        heights.append(_bar(abs(after - before), MORE if after > before else LESS, label))
    last = bars[-1].after.energy_j
    floors.append(0.0)
    heights.append(_bar(last, TOTAL, si(last, "J")))
    names = ["baseline", *(bar.technique for bar in bars), "transformed"]
    silent: Option = {"itemStyle": {"color": "transparent"}, "tooltip": {"show": False}, "silent": True}
    option = _bars(
        names,
        [
            {"type": "bar", "stack": "w", "data": floors, "name": "", **silent},
            {"type": "bar", "stack": "w", "data": heights, "name": "energy", "barCategoryGap": "35%"},
        ],
    )
    option["legend"] = {"show": False}
    note = f"In this order; shares of the baseline. What is left: {percent(last / base if base else None)}."
    return Chart("waterfall", "What each technique takes off", {"energy": option}, note=note)


def _bar(value: float, colour: str, label: str) -> Option:
    shown: Option = {"show": True, "position": "top", "formatter": label, "color": SOFT}
    return {"value": value, "itemStyle": {"color": colour, "borderRadius": 2}, "label": shown}


def _alone(report: CostReport) -> Chart:
    base = report.baseline.totals
    variants = [*report.alone, *report.stages[-1:]]
    names = [TECHNIQUE_NAMES[v.techniques[-1]] for v in report.alone] + ["all together"]

    def series(name: str, value: Callable[[Totals], float], colour: str) -> Option:
        data = [1 - value(v.totals) / value(base) if value(base) else 0.0 for v in variants]
        return {"type": "bar", "name": name, "data": data, "itemStyle": {"color": colour, "borderRadius": 2}}

    option = _bars(
        names, [series("energy", lambda t: t.energy_j, TOTAL), series("time", lambda t: t.time_s, "#a0cbe8")]
    )
    return Chart(
        "alone", "Each technique alone: share saved", {"saving": option}, {"x": "", "y": "%", "value": "%"},
        note="PSG predicts from the codes of low precision and includes it.",
    )  # fmt: skip


def _composition(report: CostReport) -> Chart:
    """Where the energy goes, with one technique more each time."""
    base = report.baseline
    first: Mapping[str, Mapping[str, float]] = {
        "by place": base.by_level(),
        "by phase": _joules(base.by_phase()),
        "by technique": _joules(base.by_technique()),
    }
    pick: Mapping[str, Callable[[Variant], Mapping[str, float]]] = {
        "by place": lambda v: v.by_level,
        "by phase": lambda v: _joules(v.by_phase),
        "by technique": lambda v: _joules(v.by_technique),
    }
    names = ["baseline", *(f"+ {bar.technique}" for bar in report.waterfall)]
    views = {
        view: _bars(names, _stacks([found, *(pick[view](v) for v in report.stages)])) for view, found in first.items()
    }
    note = "One technique more from bar to bar." if report.stages else ""
    return Chart("composition", "Where the energy goes", views, note=note)


def _layers(report: CostReport) -> Chart:
    views = {}
    for how, by in (("phase", "phase"), ("technique", "technique"), ("place", "")):
        for name, step in report.steps.items():
            views[f"{name} by {how}"] = _layer_bars(step, by)
    return Chart(
        "layers", "Energy of every layer", views, wide=True, height_px=420,
        note="In the order of the step; drag the slider to zoom, click the legend to hide a part.",
    )  # fmt: skip


def _layer_bars(step: StepCost, by: str) -> Option:
    parts: dict[str, dict[str, float]] = {}
    cells: Sequence[Cell] = pivot(step, "layer", by) if by else pivot(step, "layer")
    for cell in cells:
        found = parts.setdefault(cell.key[0] or "(no layer)", {})
        for key, joules in ({cell.key[1]: cell.total_j} if by else cell.energy_j).items():
            found[key] = found.get(key, 0.0) + joules
    option = _bars(list(parts), _stacks(list(parts.values())))
    option["dataZoom"] = [{"type": "slider", "bottom": 8, "height": 18}, {"type": "inside", "zoomOnMouseWheel": "ctrl"}]
    option["grid"]["bottom"] = 40
    if len(parts) > ALL_LABELS:
        option["xAxis"]["axisLabel"] = {"show": False}
    else:
        option["xAxis"]["axisLabel"] |= {"rotate": 35}
    return option


def _roofline(report: CostReport) -> Chart:
    views = {name: _roofline_view(report, name) for name in report.steps}
    units = {"x": "MAC/B", "y": "MAC/s", "value": "J"}
    return Chart(
        "roofline", "Roofline", views, units,
        note="Each product, while it runs. Lines: the most the board could do, by operand widths.",
    )  # fmt: skip


def _roofline_view(report: CostReport, step: str) -> Option:
    points = report.roofline()[step]
    series: list[Option] = []
    for phase in dict.fromkeys(p.phase.value for p in points):
        # Equal products lie on one another: one point, with the energy of all.
        places: dict[tuple[float, float], list[Any]] = {}
        for p in points:
            if p.phase.value == phase:
                where = (float(f"{p.macs_per_byte:.6g}"), float(f"{p.macs_per_s:.6g}"))
                entry = places.setdefault(where, [p.layer or p.name, 0, 0.0])
                entry[1] += 1
                entry[2] += p.energy_j
        data = [
            {"name": f"{first}{f' and {count - 1} more' if count > 1 else ''}", "value": [x, y, joules]}
            for (x, y), (first, count, joules) in places.items()
        ]
        look = {"color": COLOURS[phase], "opacity": 0.75}
        series.append(
            {"type": "scatter", "name": NAMES.get(phase, phase), "data": data, "symbolSize": 11, "itemStyle": look}
        )
    xs = [p.macs_per_byte for p in points]
    series += _roofs(report, min(xs, default=1.0) / 2, max(xs, default=1.0) * 2)
    axis: Option = {"type": "log", "splitLine": {"lineStyle": {"color": GRID}}, "nameTextStyle": {"color": SOFT}}
    return {
        "animation": False,
        "color": list(PALETTE),
        "legend": {"top": 0, "data": [s["name"] for s in series if s["type"] == "scatter"]},
        "grid": {"left": 8, "right": 110, "top": 56, "bottom": 28, "containLabel": True},
        "tooltip": {"trigger": "item", "confine": True},
        "xAxis": {**axis, "name": "MACs per off-chip byte", "nameLocation": "middle", "nameGap": 30},
        "yAxis": {**axis, "name": "MACs per second"},
        "series": series,
    }


def _roofs(report: CostReport, low: float, high: float) -> Iterator[Option]:
    if report.ceilings is None:
        return
    slope = report.ceilings.dram_bytes_per_s
    peaks: dict[float, str] = {}
    for widths, peak in report.ceilings.macs_per_s.items():
        peaks[peak] = f"{peaks[peak]}, {widths}" if peak in peaks else widths
    for (peak, widths), shade in zip(peaks.items(), ROOFS, strict=False):
        ridge = peak / slope
        line = [[x, min(peak, slope * x)] for x in sorted({low, min(max(ridge, low), high), high})]
        look = {"color": shade, "width": 1.5, "type": "dashed"}
        label = {"show": True, "formatter": widths, "color": SOFT, "fontSize": 11, "distance": 4}
        yield {
            "type": "line", "name": f"at most: {widths}", "data": line, "lineStyle": look, "symbol": "none",
            "itemStyle": {"color": shade}, "endLabel": label,
        }  # fmt: skip


def _bars(names: Sequence[str], series: list[Option]) -> Option:
    few: Option = {"width": 84, "overflow": "break", "lineHeight": 14} if len(names) < 8 else {}
    return {
        "animation": False,
        "color": list(PALETTE),
        "legend": {"top": 0, "type": "scroll"},
        "grid": {"left": 8, "right": 12, "top": 40, "bottom": 8, "containLabel": True},
        "tooltip": {"trigger": "axis", "axisPointer": {"type": "shadow"}, "confine": True},
        "xAxis": {
            "type": "category", "data": list(names), "axisTick": {"show": False},
            "axisLabel": {"interval": 0, "color": SOFT, **few},
        },
        "yAxis": {"type": "value", "splitLine": {"lineStyle": {"color": GRID}}},
        "series": series,
    }  # fmt: skip


def _stacks(columns: Sequence[Mapping[str, float]]) -> list[Option]:
    """One series a key, stacked over the columns."""
    found = dict.fromkeys(key for column in columns for key in column)
    keys = [*(k for k in COLOURS if k in found), *(k for k in found if k not in COLOURS)]
    spare = iter([c for c in PALETTE if c not in COLOURS.values()] * len(keys))
    return [
        {
            "type": "bar", "stack": "all", "name": NAMES.get(key, key), "barMaxWidth": 56,
            "data": [column.get(key, 0.0) for column in columns],
            "itemStyle": {"color": COLOURS.get(key) or next(spare)},
        }
        for key in keys
    ]  # fmt: skip


def _joules(found: Mapping[str, Totals]) -> dict[str, float]:
    return {key: totals.energy_j for key, totals in found.items()}
