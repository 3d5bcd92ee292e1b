"""One operation of the training step: its place, origin, width and how often it happens."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from e2pass.cost import OpSite, Phase, TensorSpec
from e2pass.step.rates import STANDARD, PredictorHardware, Rates


@dataclass(frozen=True)
class GraphNode:
    """One operation of the training step.

    Attributes:
        site: What a cost model sees; its probability is that of a step where everything runs.
        tag: What a rewrite inserted it for, e.g. ``psg.msb``; ``""`` for the model's own operations.
        gate: Index of the gate that decides about it, None if it always runs.
        full_dw: Weight whose full gradient it computes beside a predictor, ``""`` if none.
        operands: Names of the nodes it reads, those of other regions included.
        state: Names of the parameters and buffers it reads.
        dtypes: Element type of each output as stored, e.g. ``i8``; its true width is ``site.outputs[i].bits``.
        line: ``file.py:12``, the line of the user's code it comes from; ``""`` for what a rewrite made of nothing.
        made_by: Name of the pass that made it, ``capture`` for the model's own operations outside of regions.
        stage: Which step of the plan it belongs to, counted from 0 (an update: where its gradient comes from); -1 for
            the batch and the loss.
        half: The same operation on half the batch, which tells the price of a sample from that of entering the block;
            None where no gate decides about it, or the batch size is baked into the graph.
        coasts: Whether it happens in a dropped step too.
        fx_node: The node of the joint graph it stands for, None for operations outside of regions.
    """

    site: OpSite
    tag: str = ""
    gate: int | None = None
    full_dw: str = ""
    operands: tuple[str, ...] = ()
    state: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    line: str = ""
    made_by: str = ""
    stage: int = -1
    half: OpSite | None = None
    coasts: bool = False
    fx_node: fx.Node | None = field(default=None, compare=False, repr=False)

    @property
    def name(self) -> str:
        """Unique name, ``region/node``."""
        return self.site.name

    @property
    def inner_name(self) -> str:
        """Name within its region."""
        return self.site.name.removeprefix(f"{self.site.region}/")

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Shape and true width in bits of each tensor produced."""
        return self.site.outputs

    @property
    def in_forward(self) -> bool:
        """Whether it runs before the loss is known."""
        return self.site.phase in (Phase.DATA, Phase.FORWARD)

    @property
    def without_gradient(self) -> bool:
        """Whether it starts from a gradient that never arrives: the loss does not depend on that output."""
        reads = any(isinstance(arg, TensorSpec) for arg in self.site.args)
        return not self.in_forward and self.site.phase is not Phase.LOSS and reads and not (self.operands or self.state)

    @property
    def per_sample(self) -> bool:
        """Whether it does more for more samples; False for what happens once for a batch that enters a block."""
        return self.half is None or (self.half.args, self.half.outputs) != (self.site.args, self.site.outputs)

    def executions(self, rates: Rates, hardware: PredictorHardware = STANDARD) -> tuple[float, float]:
        """Expected executions per nominal step: of what happens once for a batch, and of what each sample adds."""
        often = self.site.probability
        if self.full_dw:
            often *= hardware.full_share(rates.predicted(self.full_dw))
        kept, dropped = 1.0 - rates.drop, rates.drop if self.coasts else 0.0
        return (
            often * (kept * rates.entered(self.gate) + dropped),
            often * (kept * rates.executed(self.gate) + dropped),
        )

    def probability(self, rates: Rates, hardware: PredictorHardware = STANDARD) -> float:
        """Expected executions per nominal step."""
        once, each = self.executions(rates, hardware)
        return each if self.per_sample else once
