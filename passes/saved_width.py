"""What backward keeps of norms and activations, at its true width: codes of norm inputs, one bit of a ReLU.

The operands of products need no rewrite here: the quantizers already made them codes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from e2pass.cost import Technique
from e2pass.lowering.canonical import call
from e2pass.lowering.joint import Joint
from e2pass.lowering.partition import FORWARD
from e2pass.lowering.products import gradient_dependent
from e2pass.passes.joint_rewrite import after, e2, tagged, unpack

aten = torch.ops.aten

_NORM_INPUT: dict[Any, int] = {
    aten.native_batch_norm_backward.default: 1,
    aten.native_layer_norm_backward.default: 1,
    aten.native_group_norm_backward.default: 1,
    aten._fused_rms_norm_backward.default: 1,
}


def narrow_saved(joint: Joint, norm_bits: int | None, power_of_two: bool = False) -> None:
    """Rewrite ``joint`` in place.

    Args:
        joint: Joint graph of training, its products quantized.
        norm_bits: Width of the norm inputs that backward keeps; None leaves them in fp32.
        power_of_two: Whether their scales are powers of two.
    """
    dependent = gradient_dependent(joint)
    for node in list(joint.graph.nodes):
        if node.target in _NORM_INPUT and norm_bits is not None:
            _narrow_norm(joint.graph, node, (norm_bits, *((None, True) if power_of_two else ())), dependent)
        elif node.target is aten.threshold_backward.default:
            _narrow_relu(joint.graph, node, dependent)
        elif node.target is aten.hardtanh_backward.default:
            _narrow_hardtanh(joint.graph, node, dependent)
    joint.graph.eliminate_dead_code()
    joint.graph_module.recompile()


def _saved_only_by(value: Any, readers: Iterable[Any], dependent: set[fx.Node]) -> bool:
    """Whether ``value`` is computed in forward and backward reads it in no other operator than ``readers``."""
    if not isinstance(value, fx.Node) or value in dependent or value.op == "placeholder":
        return False
    return all(user.target in readers for user in value.users if user in dependent and user.op != "output")


def _narrow_norm(graph: fx.Graph, norm: fx.Node, quantizer: tuple[Any, ...], dependent: set[fx.Node]) -> None:
    """``quantizer``: the arguments of ``e2pass::quantize`` after the tensor, width first."""
    index = _NORM_INPUT[norm.target]
    value = norm.args[index]
    if not _saved_only_by(value, _NORM_INPUT, dependent):
        return
    assert isinstance(value, fx.Node)
    tag: Any = {"tag": "bits.saved", "technique": Technique.BITS}
    with after(graph, value):
        pair = tagged(graph, e2.quantize.default, value, *quantizer, like=value, **tag)
        codes, scale = unpack(graph, pair, (quantizer[0], None))
    for node in (pair, codes, scale):
        node.meta["e2_half"] = FORWARD
    with graph.inserting_before(norm):
        norm.update_arg(index, tagged(graph, e2.dequantize.default, codes, scale, like=norm, bits=quantizer[0], **tag))


def _narrow_relu(graph: fx.Graph, backward: fx.Node, dependent: set[fx.Node]) -> None:
    """A ReLU's output is zero or lets the gradient through: one bit of it does."""
    _, output, limit = backward.args
    relu = isinstance(output, fx.Node) and output.target is aten.relu.default and limit == 0
    if not relu or not _saved_only_by(output, {aten.threshold_backward.default}, dependent):
        return
    assert isinstance(output, fx.Node)
    with after(graph, output):
        mask = _cast(graph, output, torch.bool, like=output)
    _restore(graph, backward, mask)


def _narrow_hardtanh(graph: fx.Graph, backward: fx.Node, dependent: set[fx.Node]) -> None:
    """The same for ReLU6: the gradient passes strictly between the limits, and where the input is NaN."""
    gradient, value, low, high = backward.args
    if not _saved_only_by(value, {aten.hardtanh_backward.default}, dependent):
        return
    assert isinstance(value, fx.Node)
    with after(graph, value):
        below = _forward(graph, aten.le.Scalar, value, low, like=value)
        above = _forward(graph, aten.ge.Scalar, value, high, like=value)
        outside = _forward(graph, aten.logical_or.default, below, above, like=value)
        mask = _forward(graph, aten.logical_not.default, outside, like=value)
    with graph.inserting_before(backward):
        restored = call(graph, aten.threshold_backward.default, gradient, value, 0, like=backward)
    _restore(graph, restored, mask)
    backward.replace_all_uses_with(restored)
    graph.erase_node(backward)


def _restore(graph: fx.Graph, backward: fx.Node, mask: fx.Node) -> None:
    """Let a ``threshold_backward`` read the mask as zeros and ones."""
    mask.meta["e2_bits"] = 1
    gradient = backward.args[0]
    assert isinstance(gradient, fx.Node)
    with graph.inserting_before(backward):
        backward.update_arg(1, _cast(graph, mask, gradient.meta["val"].dtype, like=backward, half=None))


def _cast(graph: fx.Graph, value: fx.Node, dtype: torch.dtype, like: fx.Node, half: str | None = FORWARD) -> fx.Node:
    node = tagged(graph, aten._to_copy.default, value, like=like, tag="bits.saved", technique=Technique.BITS, bits=1)
    node.kwargs = {"dtype": dtype}
    node.meta["val"] = node.meta["val"].to(dtype)
    node.meta["e2_half"] = half
    return node


def _forward(graph: fx.Graph, target: Any, *args: Any, like: fx.Node) -> fx.Node:
    node = tagged(graph, target, *args, like=like, tag="bits.saved", technique=Technique.BITS)
    node.meta["e2_half"] = FORWARD
    return node
