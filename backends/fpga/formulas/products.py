"""Convolutions and matrix products, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from e2pass.backends.fpga.formulas.common import ADD, tensor, width
from e2pass.backends.fpga.nest import Name, Nest
from e2pass.backends.fpga.nest import convolution as build
from e2pass.backends.fpga.nest import product as matmul
from e2pass.backends.fpga.registry import register_cost
from e2pass.backends.fpga.workload import Alu, Product, Work
from e2pass.cost import OpSite, TensorSpec


@register_cost("aten.convolution")
def convolution(site: OpSite) -> Work:
    """``macs = batch * output positions * weight elements`` (input positions if transposed).

    The weight holds ``c_out * c_in/groups * kernel`` elements, so groups and depthwise convolutions are exact.
    """
    x, w, out = tensor(site, 0), tensor(site, 1), site.outputs[0]
    nest = _nest(site.args, 3, x, w, out, "y")
    return _with_bias("conv: N*positions*|W| MACs", Product.of(nest, x, w, out), site.args[2])


@register_cost("aten.convolution_backward")
def convolution_backward(site: OpSite) -> Work:
    """Gradients of input, weight and bias, those that ``output_mask`` asks for; each a kernel of its own.

    Input and weight gradient take as many MACs as the forward convolution; the bias gradient is a sum over the
    output gradient. The input is read for the weight gradient only, the weight for the input gradient only.
    """
    gy, x, w = tensor(site, 0), tensor(site, 1), tensor(site, 2)
    products: list[Product] = []
    read = written = adds = 0.0
    names: list[str] = []
    for index, out in _by_mask(site.args[10], site.outputs).items():
        if index == 0:
            products.append(Product.of(_nest(site.args, 4, out, w, gy, "x"), gy, w, out))
            names.append("dX")
        elif index == 1:
            products.append(_weight_gradient(site, x, out, gy))
            names.append("dW")
        else:
            read, written, adds = gy.bytes, out.bytes, gy.numel
            names.append("dB")
    formula = f"conv {'+'.join(names)}: N*positions*|W| MACs"
    return Work(formula, tuple(products), read, written, alu=Alu(adds, 0), alu_bits=width(gy))


def _nest(args: Sequence[Any], at: int, x: TensorSpec, w: TensorSpec, y: TensorSpec, writes: Name) -> Nest:
    """The nest from ``x`` to ``y``, or of a gradient; the geometry stands in the arguments from ``at`` on.

    A transposed convolution goes the other way: its input is the ``y`` of the nest.
    """
    stride, padding, dilation, transposed, _, groups = args[at : at + 6]
    if transposed:
        x, y = y, x
        turned: dict[Name, Name] = {"y": "x", "x": "y", "w": "w"}
        writes = turned[writes]
    return build(x, w, y, stride=stride, padding=padding, dilation=dilation, groups=groups, writes=writes)


def _weight_gradient(site: OpSite, x: TensorSpec, out: TensorSpec, gy: TensorSpec) -> Product:
    nest = _nest(site.args, 4, x, out, gy, "w")
    operands = (gy, x) if site.args[7] else (x, gy)
    return Product.of(nest, *operands, out)


@register_cost("aten.mm", "aten._int_mm")
def mm(site: OpSite) -> Work:
    """``macs = m * k * n``."""
    return _with_bias("matmul: m*k*n MACs", _matmul(site, 0), None)


@register_cost("aten.bmm")
def bmm(site: OpSite) -> Work:
    """``macs = batch * m * k * n``."""
    return _with_bias("batched matmul: b*m*k*n MACs", _matmul(site, 0), None)


@register_cost("aten.addmm", "aten.baddbmm", "aten.addbmm")
def addmm(site: OpSite) -> Work:
    """A (batched) matrix product plus its first argument."""
    return _with_bias("matmul + bias: m*k*n MACs", _matmul(site, 1), site.args[0])


@register_cost("aten.mv", "aten.dot")
def mv(site: OpSite) -> Work:
    """A matrix or vector times a vector: one MAC per element of the first operand."""
    return Work("matrix * vector: |A| MACs", (_matvec(tensor(site, 0), tensor(site, 1), site.outputs[0]),))


@register_cost("aten.addmv")
def addmv(site: OpSite) -> Work:
    """A matrix times a vector, plus a vector."""
    product = _matvec(tensor(site, 1), tensor(site, 2), site.outputs[0])
    return _with_bias("matrix * vector + bias: |A| MACs", product, site.args[0])


@register_cost("aten.linear")
def linear(site: OpSite) -> Work:
    """``macs = rows * in * out``."""
    x, w, y = tensor(site, 0), tensor(site, 1), site.outputs[0]
    nest = matmul(x.numel // w.shape[1], w.shape[1], w.shape[0], (x.bits, w.bits, y.bits))
    return _with_bias(
        "linear: rows*in*out MACs", Product.of(nest, x, w, y), site.args[2] if len(site.args) > 2 else None
    )


def _matmul(site: OpSite, first: int) -> Product:
    a, b, out = tensor(site, first), tensor(site, first + 1), site.outputs[0]
    if a.shape[-1] != b.shape[-2]:
        raise ValueError(f"inner dimensions differ: {a.shape} and {b.shape}")
    batches = a.shape[0] if len(a.shape) == 3 else 1
    nest = matmul(a.shape[-2], a.shape[-1], b.shape[-1], (a.bits, b.bits, out.bits), batches)
    return Product.of(nest, a, b, out)


def _matvec(a: TensorSpec, b: TensorSpec, out: TensorSpec) -> Product:
    length = b.shape[-1]
    return Product.of(matmul(a.numel // max(1, length), length, 1, (a.bits, b.bits, out.bits)), a, b, out)


def _with_bias(formula: str, product: Product, bias: object) -> Work:
    if not isinstance(bias, TensorSpec):
        return Work(formula, (product,))
    return Work(formula, (product,), bias.bytes, alu=ADD.times(product.out.numel), alu_bits=width(bias, product.out))


def _by_mask(mask: Sequence[bool], outputs: Sequence[TensorSpec]) -> dict[int, TensorSpec]:
    """Pair the wanted results (0 input, 1 weight, 2 bias) with the tensors produced."""
    wanted = [index for index, flag in enumerate(mask) if flag]
    return dict(zip(wanted, outputs, strict=True))
