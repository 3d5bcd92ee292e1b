"""Convolutions and matrix products, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Sequence

from e2pass.backends.fpga.formulas.common import ADD, tensor, width
from e2pass.backends.fpga.registry import register_cost
from e2pass.backends.fpga.workload import Alu, Product, Work
from e2pass.cost import OpSite, TensorSpec


@register_cost("aten.convolution")
def convolution(site: OpSite) -> Work:
    """``macs = batch * output positions * weight elements`` (input positions if transposed).

    The weight holds ``c_out * c_in/groups * kernel`` elements, so groups and depthwise convolutions are exact.
    """
    x, w = tensor(site, 0), tensor(site, 1)
    out = site.outputs[0]
    product = Product(_conv_macs(x, w, out, transposed=bool(site.args[6])), x, w, out)
    return _with_bias("conv: N*positions*|W| MACs", product, site.args[2])


@register_cost("aten.convolution_backward")
def convolution_backward(site: OpSite) -> Work:
    """Gradients of input, weight and bias, those that ``output_mask`` asks for; each a kernel of its own.

    Input and weight gradient take as many MACs as the forward convolution; the bias gradient is a sum over the
    output gradient. The input is read for the weight gradient only, the weight for the input gradient only.
    """
    gy, x, w = tensor(site, 0), tensor(site, 1), tensor(site, 2)
    mask = site.args[10]
    macs = _conv_macs(x, w, gy, transposed=bool(site.args[7]))
    results = _by_mask(mask, site.outputs)
    products: list[Product] = []
    read = written = 0.0
    adds = 0.0
    names: list[str] = []
    for index, out in results.items():
        if index == 0:
            products.append(Product(macs, gy, w, out))
            names.append("dX")
        elif index == 1:
            products.append(Product(macs, x, gy, out))
            names.append("dW")
        else:
            read, written, adds = gy.bytes, out.bytes, gy.numel
            names.append("dB")
    formula = f"conv {'+'.join(names)}: N*positions*|W| MACs"
    return Work(formula, tuple(products), read, written, alu=Alu(adds, 0), alu_bits=width(gy))


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
    a, b = tensor(site, 0), tensor(site, 1)
    return Work("matrix * vector: |A| MACs", (Product(a.numel, a, b, site.outputs[0]),))


@register_cost("aten.addmv")
def addmv(site: OpSite) -> Work:
    """A matrix times a vector, plus a vector."""
    a, b = tensor(site, 1), tensor(site, 2)
    return _with_bias("matrix * vector + bias: |A| MACs", Product(a.numel, a, b, site.outputs[0]), site.args[0])


@register_cost("aten.linear")
def linear(site: OpSite) -> Work:
    """``macs = rows * in * out``."""
    x, w = tensor(site, 0), tensor(site, 1)
    product = Product(float(x.numel * w.shape[0]), x, w, site.outputs[0])
    return _with_bias("linear: rows*in*out MACs", product, site.args[2] if len(site.args) > 2 else None)


def _conv_macs(x: TensorSpec, w: TensorSpec, y: TensorSpec, *, transposed: bool) -> float:
    positions = (x if transposed else y).shape[2:]
    return float(x.shape[0] * math.prod(positions) * w.numel)


def _matmul(site: OpSite, first: int) -> Product:
    a, b = tensor(site, first), tensor(site, first + 1)
    if a.shape[-1] != b.shape[-2]:
        raise ValueError(f"inner dimensions differ: {a.shape} and {b.shape}")
    batches = a.shape[0] if len(a.shape) == 3 else 1
    return Product(float(a.numel * b.shape[-1]), a, b, site.outputs[0], max(batches, 1))


def _with_bias(formula: str, product: Product, bias: object) -> Work:
    if not isinstance(bias, TensorSpec):
        return Work(formula, (product,))
    return Work(formula, (product,), bias.bytes, alu=ADD.times(product.out.numel), alu_bits=width(bias, product.out))


def _by_mask(mask: Sequence[bool], outputs: Sequence[TensorSpec]) -> dict[int, TensorSpec]:
    """Pair the wanted results (0 input, 1 weight, 2 bias) with the tensors produced."""
    wanted = [index for index, flag in enumerate(mask) if flag]
    return dict(zip(wanted, outputs, strict=True))
