"""What is in a training step, and its price at given rates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from e2pass.cost import CostModel, Phase
from e2pass.diagnostics import Diagnostics
from e2pass.errors import ConfigError, LoweringError
from e2pass.lowering.joint import Joint
from e2pass.program import Program
from e2pass.report import CostReport
from e2pass.runtime.gates import SLUGates
from e2pass.step.cost import StepCost, UnitPrices, price_step
from e2pass.step.links import LOSS
from e2pass.step.node import GraphNode
from e2pass.step.outside import Outside
from e2pass.step.pricing import PricedNodes
from e2pass.step.rates import STANDARD, TECHNIQUES, PredictorHardware, Rates
from e2pass.step.side_graphs import first_output, lower_loss
from e2pass.step.sites import Place, joint_nodes
from e2pass.step.variant import Variant

OPTIMIZERS: dict[str, int] = {
    "sgd": 0, "sgd_momentum": 1, "sgd_nesterov": 1, "adam": 2, "adamw": 2, "rmsprop": 1, "adagrad": 1,
}  # fmt: skip
"""Optimizers with a price, and how many state tensors each keeps for a parameter."""


class TrainingStep:
    """Builds and prices the step of one program.

    Attributes:
        cost_model: The board.
        loss: The caller's loss, None for cross-entropy on the first output.
        optimizer: Key of ``OPTIMIZERS``.
    """

    def __init__(self, cost_model: CostModel, loss: Callable[..., Tensor] | None = None, optimizer: Any = None) -> None:
        self.cost_model, self.loss = cost_model, loss
        self.optimizer = _optimizer_name(optimizer)

    def build(self, program: Program, diagnostics: Diagnostics) -> None:
        """Write ``program.step``: the nodes of the training step, before and after the regions' rewrites."""
        outside = Outside(program)
        before, after = outside.region_nodes()
        loss = self._loss(program, diagnostics)
        rest = [
            *outside.gates(),
            *outside.merges(),
            *outside.gradient_sums(),
            *outside.weight_sums(),
            *([] if loss is None else joint_nodes(loss, Place(LOSS, {}, {}, phase=Phase.LOSS), outside.batch)),
            *outside.update(self.optimizer, OPTIMIZERS[self.optimizer]),
            *outside.unlowered(),
        ]
        joints = outside.gate_joints | ({} if loss is None else {LOSS: loss})
        program.step = BuiltStep(program, self.cost_model, [*before, *rest], [*after, *rest], joints)

    def report(
        self,
        program: Program,
        rates: Rates | None = None,
        hardware: PredictorHardware = STANDARD,
        *,
        baseline_only: bool = False,
    ) -> CostReport:
        """Price the step before and after at ``rates``; the assumed ones by default."""
        rates = assumed_rates(program) if rates is None else rates
        step: BuiltStep = program.step
        acting = () if baseline_only else active(program)
        assumptions: dict[str, Any] = {
            "batch_size": program.inputs.batch_size,
            "loss": "cross-entropy on the first output" if self.loss is None else _name(self.loss),
            "optimizer": self.optimizer,
        }
        if not baseline_only:
            assumptions |= _rate_assumptions(program, rates) | _hardware_assumptions(acting, hardware)
        return CostReport(
            board=self.cost_model.name,
            batch_size=program.inputs.batch_size,
            ceilings=getattr(self.cost_model, "ceilings", None),
            baseline=step.price((), rates, hardware),
            transformed=None if baseline_only else step.price(acting, rates, hardware),
            alone=tuple(step.variant(_with_operands(t), rates, hardware) for t in acting),
            stages=tuple(step.variant(acting[:n], rates, hardware) for n in range(1, len(acting) + 1)),
            assumptions=assumptions | dict(getattr(self.cost_model, "assumptions", {})),
            sources=self.cost_model.sources(),
        )

    def _loss(self, program: Program, diagnostics: Diagnostics) -> Joint | None:
        output = first_output(program)
        if output is None or output.dim() == 0:
            diagnostics.info("E2P601", "", "the model returns its loss itself; none is added to the step")
            return None
        try:
            return lower_loss(program, output, self.loss)
        except LoweringError as error:
            diagnostics.warn("E2P602", "loss", f"the loss has no price: {error}", "pass loss=callable(output, target)")
            return None


class BuiltStep:
    """The nodes of the training step and their prices.

    Attributes:
        plain: Nodes with regions as they were lowered.
        rewritten: Nodes with regions as quantization and PSG left them.
        joints: Joint graphs of the gates and the loss, by the region of their nodes.
        cost_model: The board.
    """

    def __init__(
        self,
        program: Program,
        cost_model: CostModel,
        plain: list[GraphNode],
        rewritten: list[GraphNode],
        joints: dict[str, Joint],
    ) -> None:
        self.plain, self.rewritten, self.joints, self.cost_model = plain, rewritten, joints, cost_model
        bits, psg = program.config.bits, program.config.psg
        known = 0 if bits is None or psg is None else min(psg.x_bits, bits.x) * min(psg.gy_bits, bits.grad)
        prices, batch = UnitPrices(cost_model), program.inputs.batch_size
        self._plain = PricedNodes(plain, prices, batch)
        self._rewritten = PricedNodes(rewritten, prices, batch, known)

    def price(self, techniques: Sequence[str], rates: Rates, hardware: PredictorHardware = STANDARD) -> StepCost:
        """Expected cost of a step with only these techniques."""
        return self._nodes(techniques).step(rates, techniques, hardware)

    def variant(self, techniques: Sequence[str], rates: Rates, hardware: PredictorHardware = STANDARD) -> Variant:
        """The same as sums."""
        return self._nodes(techniques).variant(rates, techniques, hardware)

    def _nodes(self, techniques: Sequence[str]) -> PricedNodes:
        return self._rewritten if "bits" in techniques else self._plain


def active(program: Program) -> tuple[str, ...]:
    """The techniques that the configuration asks for and the program has."""
    config = program.config
    asked = {
        "smd": config.smd is not None and "drops-batches" in program.facts,
        "slu": program.slu is not None,
        "bits": config.bits is not None,
        "psg": config.psg is not None,
    }
    return tuple(t for t in TECHNIQUES if asked[t])


def _with_operands(technique: str) -> tuple[str, ...]:
    """A technique on its own: PSG has no operands to predict from without low precision."""
    return ("bits", "psg") if technique == "psg" else (technique,)


def assumed_rates(program: Program) -> Rates:
    """The configured targets: drop probability, skip ratio, and the paper's predictor use."""
    config = program.config
    drop = config.smd.p if config.smd is not None and "drops-batches" in program.facts else 0.0
    skip: dict[int, float] = {}
    if program.slu is not None:
        slu: SLUGates = program.slu
        fixed = {"open": 0.0, "closed": 1.0, "learned": slu.target}
        skip = {i: fixed[slu.kind] if slu.kind in fixed else slu.skip_rate(i) for i in range(len(slu.gates))}
    use = 0.6 if config.psg is not None and config.psg.beta > 0 else 1.0 if config.psg is not None else 0.0
    return Rates(drop, skip, {}, use, program.inputs.batch_size)


def _optimizer_name(optimizer: Any) -> str:
    if optimizer is None:
        return "sgd_momentum"
    name = optimizer if isinstance(optimizer, str) else type(optimizer).__name__.lower()
    if isinstance(optimizer, torch.optim.SGD):
        group = optimizer.param_groups[0]
        name = "sgd" if not group["momentum"] else "sgd_nesterov" if group["nesterov"] else "sgd_momentum"
    if name not in OPTIMIZERS:
        raise ConfigError(f"the update of optimizer {name!r} has no price; those that have are {', '.join(OPTIMIZERS)}")
    return name


def _name(function: Any) -> str:
    return str(getattr(function, "__name__", type(function).__name__))


def _rate_assumptions(program: Program, rates: Rates) -> dict[str, Any]:
    return {
        "rates": rates.source,
        "mini-batches dropped": round(rates.drop, 6),
        "gated blocks skipped": round(_mean_skip(program, rates), 6),
        "weight gradients predicted": round(_mean_use(program, rates), 6),
        "skipped work": "costs neither energy nor time, and static power is spent for the time that remains; a block's "
        "weights are read, quantized and updated if any sample enters it, where samples decide independently",
    }


def _hardware_assumptions(acting: Sequence[str], hardware: PredictorHardware) -> dict[str, Any]:
    if "psg" not in acting:
        return {}
    return {
        "predicted share": "a share of the elements of a weight gradient, not of tensors; counting them is a "
        "statistic of the emulation and costs nothing",
        "predicted elements": "skipped one by one by the array, operand traffic in proportion"
        if hardware.skips == "element"
        else "not skipped: a weight gradient is computed in full unless all of it is predicted",
        "predictor's product": "reused: the full product costs the bits that remain"
        if hardware.reuse
        else "not reused: the full product is computed anew",
    }


def _mean_skip(program: Program, rates: Rates) -> float:
    """Energy-weighted over the gated blocks."""
    if program.slu is None or not rates.skip:
        return 0.0
    weight = program.slu.weight.tolist()
    return float(sum(weight[i] * s for i, s in rates.skip.items()))


def _mean_use(program: Program, rates: Rates) -> float:
    """Over the elements of all predicted weight gradients."""
    if not rates.use:
        return rates.default_use
    sizes = {name: p.numel() for name, p in program.model.named_parameters(remove_duplicate=False)}
    return sum(u * sizes[name] for name, u in rates.use.items()) / sum(sizes[name] for name in rates.use)


def block_energy(program: Program, cost_model: CostModel) -> dict[int, float]:
    """Modelled joules of each gated body's forward, dX and dW in one baseline step, by gate index."""
    batch = program.inputs.batch_size
    energies: dict[int, float] = {}
    for region in program.plans["train"].regions:
        if region.block is None:
            continue
        joule = 0.0
        if region.name in program.lowered:
            nodes = joint_nodes(program.lowered[region.name][0], Place(region.name, {}, {}), batch)
            joule = price_step((n.site for n in nodes), cost_model).energy_j
        energies[region.block] = joule
    return energies
