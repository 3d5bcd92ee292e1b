"""A forward half whose codes do not depend on the order in which a kernel adds up (``Bits(bit_true=True)``).

With powers of two as scales, a product of codes is an integer times a power of two, and sums of such are exact in
float32 up to 2^24 of that unit, in any order. What would spoil this is rewritten here: biases are added behind the
product, and norms, means and sums are taken in double precision. What stays dependent on order, or is rounded by a
library's own function, is named.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx

from e2pass.cost import Technique
from e2pass.lowering.canonical import call
from e2pass.lowering.joint import Joint
from e2pass.lowering.products import Product, Role, gradient_dependent
from e2pass.passes.joint_rewrite import after, tagged
from e2pass.runtime import bit_true  # noqa: F401  defines its operators

aten = torch.ops.aten
e2 = torch.ops.e2pass

_NORMS: dict[Any, Any] = {
    aten._native_batch_norm_legit_functional.default: e2.batch_norm.default,
    aten._native_batch_norm_legit.no_stats: e2.batch_norm.default,
    aten._native_batch_norm_legit_no_training.default: e2.batch_norm.default,
    aten.native_layer_norm.default: e2.layer_norm.default,
    aten.native_group_norm.default: e2.group_norm.default,
}
_SUMS: dict[Any, Any] = {
    aten.mean.default: e2.mean.default,
    aten.mean.dim: e2.mean.default,
    aten.sum.default: e2.sum.default,
    aten.sum.dim_IntList: e2.sum.default,
}
_EXACT = frozenset(
    {
        *("max", "min", "amax", "amin", "aminmax", "argmax", "argmin", "any", "all", "sort", "topk", "native_dropout"),
        *("max_pool2d_with_indices", "max_pool3d_with_indices", "_adaptive_max_pool2d", "adaptive_max_pool2d"),
        *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "pixel_shuffle", "pixel_unshuffle"),
        *("clone", "_to_copy", "copy", "lift_fresh_copy", "contiguous", "reshape", "_unsafe_view", "cat", "stack"),
        *("index", "_unsafe_index", "index_select", "gather", "embedding", "scatter", "index_copy", "slice_scatter"),
        *("select_scatter", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad2d", "repeat"),
        *("flip", "roll", "tril", "triu", "full", "full_like", "zeros", "zeros_like", "ones", "ones_like", "empty"),
        *("empty_like", "new_zeros", "new_ones", "new_full", "new_empty", "arange", "scalar_tensor", "getitem"),
        *("convolution", "mm", "bmm"),
    }
)
"""What moves or chooses elements, or is looked at elsewhere (products); views and element-wise operators come to it."""
_LIBRARY = frozenset(
    {
        *("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "erf", "erfc", "pow", "rsqrt", "sin", "cos", "tan"),
        *("gelu", "silu", "sigmoid", "tanh", "mish", "softplus", "elu", "celu", "selu", "log_sigmoid_forward", "atan"),
        *("hardswish", "hardsigmoid", "addcmul", "addcdiv", "lerp", "logit", "xlogy", "sinh", "cosh", "asin", "acos"),
    }
)
"""Element-wise functions that libraries approximate, or may contract, each in a way of its own."""

MANTISSA = 24
"""Bits of integers that float32 holds exactly."""


def make_bit_true(joint: Joint) -> None:
    """Rewrite the forward half of ``joint`` in place; ``notes["order_dependent"]`` names what is left, with reasons."""
    left = joint.notes["order_dependent"] = {}
    dependent = gradient_dependent(joint)
    for node in [n for n in joint.graph.nodes if n.op == "call_function" and n not in dependent]:
        if node.target in _NORMS:
            _replace_norm(node)
        elif node.target in _SUMS and node.args[0].meta["val"].is_floating_point() and not node.kwargs:
            _replace_sum(node)
        elif node.target is aten.avg_pool2d.default and _is_global(node):
            _become(node, e2.mean.default, (node.args[0], [2, 3], True))
        elif node.target is aten.convolution.default and node.args[2] is not None:
            _split_convolution(joint.graph, node)
        elif node.target is aten.addmm.default and not node.kwargs:
            _split_addmm(joint.graph, node)
        elif (reason := _order_dependent(node)) is not None:
            left[node.name] = reason
    joint.graph.lint()
    joint.graph_module.recompile()


def exceeds(product: Product, x_bits: int, w_bits: int) -> str | None:
    """Why the sums of a forward product may not be exact, or None."""
    weight = next(o for o in product.operands if o.role is Role.W)
    args: Any = product.node.args
    shape = args[weight.index].meta["val"].shape
    if product.node.target is not aten.convolution.default:
        terms = int(shape[-2] if weight.index == max(o.index for o in product.operands) else shape[-1])
    elif args[6]:
        terms = math.prod(shape) // shape[1] // args[8]
    else:
        terms = math.prod(shape[1:])
    largest = terms * (2 ** (x_bits - 1) - 1) * (2 ** (w_bits - 1) - 1)
    if largest <= 2**MANTISSA:
        return None
    return (
        f"{terms} products of {x_bits} and {w_bits} bits can sum up to 2^{math.log2(largest):.1f}, and float32 is "
        f"exact to 2^{MANTISSA}"
    )


def _replace_norm(node: fx.Node) -> None:
    args = node.args
    if node.target is aten._native_batch_norm_legit.no_stats:
        args = (*args[:3], None, None, *args[3:])
    elif node.target is aten._native_batch_norm_legit_no_training.default:
        args = (*args[:5], False, *args[5:])
    _become(node, _NORMS[node.target], args)


def _replace_sum(node: fx.Node) -> None:
    args: Any = node.args
    dims = args[1] if len(args) > 1 and args[1] else list(range(args[0].meta["val"].dim()))
    _become(node, _SUMS[node.target], (args[0], dims, *args[2:]))


def _is_global(pool: fx.Node) -> bool:
    """Whether there is one window, the whole map of (N, C, H, W)."""
    x, kernel, *rest = pool.args
    padding: Any = rest[1] if len(rest) > 1 else [0, 0]
    divisor = rest[4] if len(rest) > 4 else None
    value: Any = x.meta["val"]  # type: ignore[union-attr]
    return value.dim() == 4 and list(value.shape[2:]) == list(kernel) and not any(padding) and divisor is None  # type: ignore[arg-type]


def _become(node: fx.Node, target: Any, args: Any) -> None:
    """Values are propagated anew: the layout, and results that nobody reads, may differ."""
    node.target, node.args = target, args
    node.meta.update(e2_tag="bits.exact", e2_technique=Technique.BITS)
    values: Any = fx.node.map_arg(args, lambda n: n.meta["val"])
    with values[0].fake_mode:
        node.meta["val"] = target(*values)
    for item in node.users:
        if item.target is operator.getitem:
            item.meta["val"] = node.meta["val"][item.args[1]]


def _split_convolution(graph: fx.Graph, node: fx.Node) -> None:
    bias: Any = node.args[2]
    node.update_arg(2, None)
    shape = [1, -1, *[1] * (node.meta["val"].dim() - 2)]
    with after(graph, node):
        column = _exact(graph, aten.view.default, bias, shape, like=node)
        added = _exact(graph, aten.add.Tensor, node, column, like=node)
    node.replace_all_uses_with(added, delete_user_cb=lambda user: user is not added)


def _split_addmm(graph: fx.Graph, node: fx.Node) -> None:
    bias, a, b = node.args
    with graph.inserting_before(node):
        product = call(graph, aten.mm.default, a, b, like=node)
        added = _exact(graph, aten.add.Tensor, product, bias, like=node)
    node.replace_all_uses_with(added)
    graph.erase_node(node)


def _exact(graph: fx.Graph, target: Any, *args: Any, like: fx.Node) -> fx.Node:
    return tagged(graph, target, *args, like=like, tag="bits.exact", technique=Technique.BITS)


def _order_dependent(node: fx.Node) -> str | None:
    value, target = node.meta.get("val"), node.target
    first = value[0] if isinstance(value, tuple | list) and value else value
    if not isinstance(first, torch.Tensor) or not first.is_floating_point():
        return None
    name = target.__name__.partition(".")[0]  # type: ignore[union-attr]
    scaled = name in ("add", "sub", "rsub") and node.kwargs.get("alpha", 1) != 1
    if name in _LIBRARY or scaled:
        return f"{name} is rounded as the library at hand rounds it"
    if name in _EXACT or (isinstance(target, torch._ops.OpOverload) and _changes_nothing(target)):
        return None
    return f"{name} adds in an order of the kernel's own"


def _changes_nothing(target: torch._ops.OpOverload) -> bool:
    """Of the order of sums: views, and what is computed element by element."""
    return target.is_view or torch.Tag.pointwise in target.tags
