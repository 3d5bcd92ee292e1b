"""Losses and their gradients."""

from __future__ import annotations

from e2pass.backends.fpga.formulas.common import EXP, LOG, stream, tensor
from e2pass.backends.fpga.registry import register_cost
from e2pass.backends.fpga.workload import Alu, Work
from e2pass.cost import OpSite, TensorSpec

PER_ELEMENT: dict[str, Alu] = {
    "mse_loss": Alu(2, 1),
    "mse_loss_backward": Alu(1, 2),
    "smooth_l1_loss": Alu(4, 2),
    "smooth_l1_loss_backward": Alu(3, 2),
    "huber_loss": Alu(4, 2),
    "huber_loss_backward": Alu(3, 2),
    "binary_cross_entropy": LOG.times(2).plus(Alu(4, 2)),
    "binary_cross_entropy_backward": Alu(4, 8),
    "binary_cross_entropy_with_logits": EXP.plus(LOG).plus(Alu(4, 2)),
    "soft_margin_loss": EXP.plus(LOG).plus(Alu(2, 1)),
    "soft_margin_loss_backward": EXP.plus(Alu(3, 6)),
}
"""Operations per element of the prediction."""


@register_cost(*(f"aten.{name}" for name in PER_ELEMENT))
def elementwise_loss(site: OpSite) -> Work:
    """Prediction and target are read; so many operations per element."""
    elements = max(t.numel for t in site.inputs)
    return stream(site, "loss: per element", PER_ELEMENT[site.op.split(".")[1]], elements=elements)


@register_cost("aten.nll_loss_forward", "aten.nll_loss2d_forward")
def nll(site: OpSite) -> Work:
    """One log-probability is picked per target."""
    logp, target = tensor(site, 0), tensor(site, 1)
    picked = TensorSpec(target.shape, logp.bits, logp.saved)
    return stream(site, "nll: one element per target", Alu(1, 1), elements=target.numel, reads=(picked, target))


@register_cost("aten.nll_loss_backward", "aten.nll_loss2d_backward")
def nll_backward(site: OpSite) -> Work:
    """The gradient is zero but for one element per target; the log-probabilities, an argument too, are not read."""
    gy, target = tensor(site, 0), tensor(site, 2)
    return stream(
        site, "nll backward: zero-filled, one element per target", Alu(0, 1), reads=(gy, target), elements=target.numel
    )
