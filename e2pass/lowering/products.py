"""Products of a joint graph: which convolutions and matrix products there are, and what their operands are.

Found from the graph alone: an operand is a weight if layout operations lead back to a parameter, a gradient if it
depends on a tangent, an activation otherwise; a product computes a weight gradient if layout operations and sums lead
from a parameter's gradient output back to it.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import fx

from e2pass.lowering.joint import Joint

aten = torch.ops.aten

LAYOUT_OPS: frozenset[Any] = frozenset(
    {
        aten.t.default,
        aten.transpose.int,
        aten.permute.default,
        aten.view.default,
        aten._unsafe_view.default,
        aten.reshape.default,
        aten.clone.default,
        aten.expand.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.squeeze.default,
        aten.unsqueeze.default,
        aten.slice.Tensor,
        aten.select.int,
    }
)
"""Operations that move elements and change none: quantization commutes with them (one scale for the tensor)."""

_SUMS: frozenset[Any] = frozenset({aten.sum.dim_IntList, aten.add.Tensor})

_FACTORS: dict[Any, tuple[int, int]] = {
    aten.convolution.default: (0, 1),
    aten.mm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.bmm.default: (0, 1),
    aten.baddbmm.default: (1, 2),
}


class Role(StrEnum):
    """What an operand of a product is."""

    X = "x"
    W = "w"
    GY = "grad"


@dataclass(frozen=True)
class Operand:
    """One factor of a product.

    Attributes:
        index: Position among the product's arguments.
        base: Node whose values the factor holds, before any layout operation.
        chain: Layout operations from ``base`` to the factor, in order.
        role: Activation, weight or gradient.
    """

    index: int
    base: fx.Node
    chain: tuple[fx.Node, ...]
    role: Role


@dataclass(frozen=True)
class Product:
    """A convolution or matrix product and its two factors."""

    node: fx.Node
    operands: tuple[Operand, Operand]

    @property
    def backward(self) -> bool:
        """Whether one factor is a gradient."""
        return any(o.role is Role.GY for o in self.operands)

    @property
    def has_weight(self) -> bool:
        """Whether one factor is a parameter: a forward product or a dX of a layer."""
        return any(o.role is Role.W for o in self.operands)


@dataclass(frozen=True)
class WeightGradient:
    """Where the gradient of one parameter comes from.

    Attributes:
        target: Name of the parameter.
        value: Node that holds the gradient.
        products: Products whose (summed, re-laid-out) results it is; empty if it comes from something else too.
        reason: Why it is not a sum of products, ``""`` if it is.
        kind: What else the parameter is: ``embeddings``, ``norms``, ``biases`` or ``""``.
    """

    target: str
    value: fx.Node
    products: tuple[fx.Node, ...]
    reason: str = ""
    kind: str = ""


def gradient_dependent(joint: Joint) -> set[fx.Node]:
    """Nodes that depend on a tangent."""
    dependent = {
        n
        for n, (kind, _) in zip(joint.graph.find_nodes(op="placeholder"), joint.inputs, strict=True)
        if kind == "tangent"
    }
    for node in joint.graph.nodes:
        if any(a in dependent for a in node.all_input_nodes):
            dependent.add(node)
    return dependent


def find_products(joint: Joint) -> list[Product]:
    """All convolutions and matrix products over floating-point tensors, in graph order."""
    placeholders = joint.graph.find_nodes(op="placeholder")
    weights = {n for n, (kind, _) in zip(placeholders, joint.inputs, strict=True) if kind == "param"}
    dependent = gradient_dependent(joint)
    products = []
    for node in joint.graph.nodes:
        factors = _factors(node)
        if factors is not None:
            first, second = (_operand(node, i, weights, dependent) for i in factors)
            products.append(Product(node, (first, second)))
    return products


def _factors(node: fx.Node) -> tuple[int, int] | None:
    if node.target is aten.convolution_backward.default:
        mask: Any = node.args[-1]
        wants_dx, wants_dw, _ = mask
        return (0, 2) if wants_dx else (0, 1) if wants_dw else None
    return _FACTORS.get(node.target)


def _operand(product: fx.Node, index: int, weights: set[fx.Node], dependent: set[fx.Node]) -> Operand:
    base, chain = layout_chain(product.args[index])  # type: ignore[arg-type]
    role = Role.GY if base in dependent else Role.W if base in weights else Role.X
    return Operand(index, base, chain, role)


def layout_chain(value: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    """The node whose elements ``value`` holds, and the layout operations between the two, in order."""
    chain: list[fx.Node] = []
    while value.target in LAYOUT_OPS:
        chain.append(value)
        value = value.args[0]  # type: ignore[assignment]
    return value, tuple(reversed(chain))


def output_axis(product: Product, weight: Operand) -> int | None:
    """The weight's dimension that runs over output channels of a forward product; None if none does so alone.

    Where several do (``ihd`` in an einsum over heads), it is the longest.
    """
    node, shape = product.node, weight.base.meta["val"].shape
    if node.target is aten.convolution.default:
        return 1 if node.args[6] else 0  # a transposed convolution keeps its input channels first
    contracted = -1 if weight.index == min(o.index for o in product.operands) else -2
    candidates = []
    for axis, size in enumerate(shape):
        place = torch.arange(size).reshape([-1 if d == axis else 1 for d in range(len(shape))]).expand(shape)
        factor = place.contiguous()
        for step in weight.chain:
            factor = step.target(factor, *fx.node.map_arg(step.args[1:], _hint), **step.kwargs)  # type: ignore[operator]
        if factor.eq(factor.narrow(contracted, 0, 1)).all():
            candidates.append(axis)
    return max(candidates, key=lambda axis: int(shape[axis]), default=None)


def _hint(node: fx.Node) -> Any:
    return node.meta["val"].node.hint


def weight_gradients(joint: Joint) -> list[WeightGradient]:
    """The gradient outputs of all parameters, each traced back to the products it comes from."""
    placeholders = dict(zip(joint.inputs, joint.graph.find_nodes(op="placeholder"), strict=True))
    found = []
    for (kind, key), value in zip(joint.outputs, joint.output_nodes(), strict=True):
        if kind == "grad" and key[0] == "param":
            found.append(_trace_gradient(key[1], placeholders[key], value))
    return found


def _trace_gradient(target: str, parameter: fx.Node, value: fx.Node) -> WeightGradient:
    if value.meta["val"].dim() < 2:
        kind = _vector_kind(parameter)
        reason = f"it has one dimension (one of the {kind}), which keeps full precision"
        return WeightGradient(target, value, (), reason, kind)
    products: list[fx.Node] = []
    stack = [value]
    while stack:
        node = stack.pop()
        if node.op == "call_function" and _produces_weight_gradient(node):
            products.append(node)
        elif node.target in LAYOUT_OPS or node.target in _SUMS:
            stack.extend(node.all_input_nodes)
        else:
            return WeightGradient(target, value, (), *_why_no_product(node))
    return WeightGradient(target, value, tuple(products))


def _why_no_product(node: fx.Node) -> tuple[str, str]:
    """Why a gradient that comes from ``node`` is not one of a product, and what its parameter is."""
    if node.target is aten.embedding_dense_backward.default:
        return "it is an embedding, whose gradient is a scatter and keeps full precision", "embeddings"
    source = node.args[0] if node.target is operator.getitem else node
    name = source.target if isinstance(source, fx.Node) and source.op == "call_function" else node.name
    return f"part of its gradient comes from {name}, not from a convolution or matrix product", ""


def _vector_kind(parameter: fx.Node) -> str:
    """A vector that is added to a product or an activation is a bias; others scale or shift inside a norm."""
    added = {aten.convolution.default: 2, aten.addmm.default: 0, aten.baddbmm.default: 0}
    stack = [parameter]
    while stack:
        node = stack.pop()
        for user in node.users:
            if user.target in LAYOUT_OPS:
                stack.append(user)
            elif user.target is aten.add.Tensor or (user.target in added and user.args[added[user.target]] is node):
                return "biases"
    return "norms"


def _produces_weight_gradient(node: fx.Node) -> bool:
    if getattr(node.target, "__name__", "") == "getitem":
        source = node.args[0]
        return isinstance(source, fx.Node) and source.target is aten.convolution_backward.default
    return node.target in _FACTORS
