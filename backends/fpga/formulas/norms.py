"""Normalisation: batch, layer, group and root mean square, forward and backward."""

from __future__ import annotations

import math

from e2pass.backends.fpga.formulas.common import DIVIDE, SQRT, stream, tensor
from e2pass.backends.fpga.registry import register_cost
from e2pass.backends.fpga.workload import Alu, Reread, Work
from e2pass.cost import OpSite, TensorSpec

STATISTICS = Alu(2, 1)
"""Per element: its sum and the sum of its squares."""
NORMALISE = Alu(2, 2)
"""Per element: subtract the mean, multiply by the reciprocal deviation, scale, shift."""
NORMALISE_FOLDED = Alu(1, 1)
"""The same with fixed statistics, folded into one factor and one offset per channel."""
SUMS_BACKWARD = Alu(3, 2)
"""Per element: the normalised value, the gradient's sum and its product with that value."""
INPUT_BACKWARD = Alu(2, 2)
"""Per element of the input gradient: subtract both means, scale."""


@register_cost(
    "aten.native_batch_norm",
    "aten._native_batch_norm_legit",
    "aten._native_batch_norm_legit_functional",
    "aten._batch_norm_with_update",
    "aten._batch_norm_with_update_functional",
    "aten.cudnn_batch_norm",
    "aten.miopen_batch_norm",
    "e2pass.batch_norm",
)
def batch_norm(site: OpSite) -> Work:
    """Statistics over each channel, then normalisation: a second read unless a channel fits on the chip."""
    x = tensor(site, 0)
    if not _training(site):
        return batch_norm_eval(site)
    return stream(
        site,
        "batch norm, training: statistics, then normalise",
        STATISTICS.plus(NORMALISE),
        elements=x.numel,
        rereads=(Reread(x.bytes, _channel(x), x.saved),),
    )


@register_cost("aten._native_batch_norm_legit_no_training", "aten._batch_norm_no_update")
def batch_norm_eval(site: OpSite) -> Work:
    """Normalisation with running statistics."""
    return stream(site, "batch norm, running statistics", NORMALISE_FOLDED, elements=tensor(site, 0).numel)


@register_cost("aten.native_batch_norm_backward", "aten.cudnn_batch_norm_backward", "aten.batch_norm_backward")
def batch_norm_backward(site: OpSite) -> Work:
    """Sums over each channel, then the input gradient: both operands are read again unless a channel fits."""
    gy, x = (tensor(site, 0), tensor(site, 1)) if "cudnn" not in site.op else (tensor(site, 1), tensor(site, 0))
    if not _training(site):
        return stream(site, "batch norm backward, running statistics", SUMS_BACKWARD.plus(Alu(0, 1)), elements=x.numel)
    part = _channel(x) + _channel(gy)
    rereads = (Reread(x.bytes, part, x.saved), Reread(gy.bytes, part))
    return _backward(site, "batch norm backward: sums, then dX", x, rereads)


@register_cost("aten.native_layer_norm", "aten._fused_rms_norm", "e2pass.layer_norm")
def layer_norm(site: OpSite) -> Work:
    """Statistics over each row, then normalisation."""
    x = tensor(site, 0)
    row = math.prod(site.args[1]) * x.bits / 8
    rereads = (Reread(x.bytes, row, x.saved),)
    return stream(site, "layer norm", STATISTICS.plus(NORMALISE), elements=x.numel, rereads=rereads)


@register_cost("aten.native_layer_norm_backward", "aten._fused_rms_norm_backward")
def layer_norm_backward(site: OpSite) -> Work:
    """Sums over each row, then the input gradient."""
    gy, x = tensor(site, 0), tensor(site, 1)
    row = math.prod(site.args[2]) * (x.bits + gy.bits) / 8
    return _backward(site, "layer norm backward", x, (Reread(x.bytes, row, x.saved), Reread(gy.bytes, row)))


@register_cost("aten.native_group_norm", "e2pass.group_norm")
def group_norm(site: OpSite) -> Work:
    """Statistics over each sample's group of channels, then normalisation."""
    x, samples, groups = tensor(site, 0), site.args[3], site.args[6]
    rereads = (Reread(x.bytes, x.bytes / max(1, samples * groups), x.saved),)
    return stream(site, "group norm", STATISTICS.plus(NORMALISE), elements=x.numel, rereads=rereads)


@register_cost("aten.native_group_norm_backward")
def group_norm_backward(site: OpSite) -> Work:
    """Sums over each sample's group of channels, then the input gradient."""
    gy, x, samples, groups = tensor(site, 0), tensor(site, 1), site.args[5], site.args[8]
    part = (x.bytes + gy.bytes) / max(1, samples * groups)
    return _backward(site, "group norm backward", x, (Reread(x.bytes, part, x.saved), Reread(gy.bytes, part)))


@register_cost("aten._weight_norm_interface")
def weight_norm(site: OpSite) -> Work:
    """``g * v / |v|``: squares and their sum over each slice, a root for each norm, then a product per element."""
    v, norms = tensor(site, 0), site.outputs[1]
    alu = Alu(1, 2).times(v.numel).plus(SQRT.plus(DIVIDE).times(norms.numel))
    rereads = (Reread(v.bytes, v.bytes / max(1, norms.numel)),)
    return stream(site, "weight norm: norms, then scale", alu, elements=1, rereads=rereads)


@register_cost("aten._weight_norm_interface_backward")
def weight_norm_backward(site: OpSite) -> Work:
    """The sum of ``gw * v`` over each slice, then both gradients: two products and a difference per element."""
    gw, v, norms = tensor(site, 0), tensor(site, 1), tensor(site, 3)
    alu = Alu(2, 3).times(v.numel).plus(DIVIDE.times(2).times(norms.numel))
    part = (gw.bytes + v.bytes) / max(1, norms.numel)
    rereads = (Reread(gw.bytes, part), Reread(v.bytes, part))
    return stream(site, "weight norm backward", alu, elements=1, rereads=rereads)


def _backward(site: OpSite, formula: str, x: TensorSpec, rereads: tuple[Reread, ...]) -> Work:
    """Sums, and the input gradient with its second pass where ``output_mask`` (the last argument) asks for it."""
    mask = site.args[-1]
    wants_input = not isinstance(mask, tuple | list) or bool(mask[0])
    per_element = SUMS_BACKWARD.plus(INPUT_BACKWARD) if wants_input else SUMS_BACKWARD
    return stream(site, formula, per_element, elements=x.numel, rereads=rereads if wants_input else ())


def _channel(x: TensorSpec) -> float:
    """Bytes of one channel of all samples."""
    return x.bytes / max(1, x.shape[1] if len(x.shape) > 1 else 1)


def _training(site: OpSite) -> bool:
    """The ``training`` argument: the only bool of these schemas outside of masks; those without it train."""
    return next((value for value in site.args if isinstance(value, bool)), True)
