"""A cost report of a made-up step, complete in every part, for tests of how reports are written."""

from __future__ import annotations

from dataclasses import replace

from e2pass.backends.fpga import FpgaCostModel
from e2pass.cost import OpSite, Phase, Technique, TensorSpec
from e2pass.report import CostReport
from e2pass.step.cost import UnitPrices
from e2pass.step.node import GraphNode
from e2pass.step.pricing import PricedNodes
from e2pass.step.rates import PredictorHardware, Rates

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=2'>&$_{b}|[x](y)%\\"
"""A module path that is code in every format, if it is not escaped."""
STAGES = (("smd",), ("smd", "slu"), ("smd", "slu", "bits"), ("smd", "slu", "bits", "psg"))
ALONE = (("smd",), ("slu",), ("bits",), ("bits", "psg"))


def node(
    layer: str,
    phase: Phase,
    size: int = 16,
    bits: int = 32,
    technique: Technique = Technique.BASE,
    gate: int | None = None,
) -> GraphNode:
    """A matrix product of ``size``, in a block of its own."""
    a = TensorSpec((size, size), bits)
    site = OpSite(
        f"r/{layer}_{phase}_{bits}", "aten.mm.default", (a, a), (TensorSpec((size, size)),),
        layer=layer, block=layer or None, phase=phase, technique=technique,
    )  # fmt: skip
    return GraphNode(site, gate=gate)


def made_up(layers: int = 3, hostile: str = "features.0") -> CostReport:
    """A report with every technique at work on ``layers`` layers, the first named ``hostile``."""
    model = FpgaCostModel("zedboard")
    names = [hostile, *(f"layer{i}" for i in range(1, layers))]
    phases = (Phase.FORWARD, Phase.DX, Phase.DW, Phase.UPDATE)
    plain = [node(n, p, 64 + 16 * i, gate=i or None) for i, n in enumerate(names) for p in phases]
    after = [replace(n, site=replace(n.site, args=tuple(replace(a, bits=8) for a in n.site.args))) for n in plain]
    extra = [
        node("gates", Phase.FORWARD, technique=Technique.SLU),
        node("codes", Phase.FORWARD, technique=Technique.BITS),
        node(hostile, Phase.DW, 48, 8, technique=Technique.PSG),
    ]
    prices = UnitPrices(model)
    steps = {False: PricedNodes([*plain, *extra], prices, 8), True: PricedNodes([*after, *extra], prices, 8)}
    rates, hardware = Rates(0.5, dict.fromkeys(range(1, layers), 0.4), batch=8), PredictorHardware()
    return CostReport(
        board=model.name,
        baseline=steps[False].step(rates, (), hardware),
        transformed=steps[True].step(rates, STAGES[-1], hardware),
        alone=tuple(steps["bits" in t].variant(rates, t, hardware) for t in ALONE),
        stages=tuple(steps["bits" in t].variant(rates, t, hardware) for t in STAGES),
        batch_size=8,
        ceilings=model.ceilings,
        assumptions={"rates": "assumed", "loss": "cross-entropy", "model": hostile},
        sources=model.sources(),
    )
