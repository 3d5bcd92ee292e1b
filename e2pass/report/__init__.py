"""Cost reports: what a training step costs before and after the transformation, in every form.

``cost_report`` holds the data, ``sections`` the tables that ``text``, ``markdown`` and ``latex`` write, ``document``
the JSON form, ``lines`` the CSV form; the HTML page is ``e2pass.backends.html``.
"""

from __future__ import annotations

from e2pass.report.bars import Bar, waterfall
from e2pass.report.cells import DIMENSIONS, Cell, pivot
from e2pass.report.comparison import Comparison, compare
from e2pass.report.cost_report import BASIS, CostReport, Saving
from e2pass.report.files import save
from e2pass.report.rooflines import Ceilings, RooflinePoint, roofline
from e2pass.report.run import RunCost, RunTotals
from e2pass.report.units import si
from e2pass.step.cost import CostRow, Coverage, FreeOp, StepCost, Totals, UnpricedOp, price_step
from e2pass.step.variant import Variant

__all__ = [
    "BASIS",
    "DIMENSIONS",
    "Bar",
    "Ceilings",
    "Cell",
    "Comparison",
    "CostReport",
    "CostRow",
    "Coverage",
    "FreeOp",
    "RooflinePoint",
    "RunCost",
    "RunTotals",
    "Saving",
    "StepCost",
    "Totals",
    "UnpricedOp",
    "Variant",
    "compare",
    "pivot",
    "price_step",
    "roofline",
    "save",
    "si",
    "waterfall",
]
