"""The variance that the predictor's coarse codes put into each weight gradient, for the paper's error bound.

The paper (appendix to section 3.3) treats what the most significant bits leave out as uniform noise: a code of step
``d`` has the variance ``d^2 / 12``. A weight gradient ``sum_p x_p gy_p`` then has the variance
``d_x^2/12 sum_p gy_p^2 + d_gy^2/12 sum_p x_p^2``. Both sums are products of the same kind as the gradient, of squares
with ones; as one factor is constant along the batch, the other is summed over it first, and the product has batch 1.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from e2pass.cost import Phase, Technique
from e2pass.lowering.products import WeightGradient
from e2pass.passes.joint_rewrite import after, rebuild, source_product, tagged

aten = torch.ops.aten

_WITHOUT_ADDEND: dict[Any, Any] = {aten.addmm.default: aten.mm.default, aten.baddbmm.default: aten.bmm.default}


def error_variance(graph: fx.Graph, gradient: WeightGradient, steps: Mapping[fx.Node, Mapping[int, Any]]) -> fx.Node:
    """Insert the computation of the variance of each element of a predicted gradient.

    Args:
        graph: Joint graph.
        gradient: The weight's.
        steps: For each of its products and each of the operands' positions the 0-d step of the codes the predictor
            sees, None where it sees all bits.
    """
    variances = {node: _product_variance(graph, node, steps[node]) for node in gradient.products}
    return rebuild(graph, gradient, variances, "psg.stats")


def _product_variance(graph: fx.Graph, node: fx.Node, steps: Mapping[int, Any]) -> fx.Node:
    product = source_product(node)
    with after(graph, node):
        insert = _Inserter(graph, node)
        terms = [_noise_of(insert, product, i, step) for i, step in steps.items() if step is not None]
        if not terms:
            return insert(aten.zeros_like.default, node)
        total = terms[0]
        for term in terms[1:]:
            total = insert(aten.add.Tensor, total, term)
        return total


class _Inserter:
    def __init__(self, graph: fx.Graph, like: fx.Node) -> None:
        self.graph, self.like = graph, like

    def __call__(self, target: Any, *args: Any) -> fx.Node:
        return tagged(
            self.graph, target, *args, like=self.like, tag="psg.stats", technique=Technique.PSG, phase=Phase.BACKWARD
        )


def _noise_of(insert: _Inserter, product: fx.Node, noisy: int, step: fx.Node) -> fx.Node:
    """The part of the variance that comes from operand ``noisy``: squares of the other, summed alike."""
    convolution = product.target is aten.convolution_backward.default
    indices = (1, 2) if product.target in _WITHOUT_ADDEND else (0, 1)
    args = list(product.args)
    for place, index in enumerate(indices):
        operand = product.args[index]
        assert isinstance(operand, fx.Node)
        summed = 0 if convolution else operand.meta["val"].dim() - 1 - place
        if index == noisy:
            first = insert(aten.slice.Tensor, operand, summed, 0, 1)
            args[index] = insert(aten.ones_like.default, first)
        else:
            args[index] = insert(aten.sum.dim_IntList, insert(aten.mul.Tensor, operand, operand), [summed], True)
    if not convolution:
        result = insert(_WITHOUT_ADDEND.get(product.target, product.target), *(args[i] for i in indices))
    else:
        result = insert(operator.getitem, insert(aten.convolution_backward.default, *args), 1)
    noise = insert(aten.mul.Scalar, insert(aten.mul.Tensor, step, step), 1 / 12)
    return insert(aten.mul.Tensor, result, noise)
