"""Backward operators rewritten for ONNX, against PyTorch's own kernels in double precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from e2pass.backends.onnx_export import decompositions

aten = torch.ops.aten


@pytest.mark.parametrize(
    ("shape", "weight", "stride", "padding", "dilation", "transposed", "groups"),
    [
        ((3, 4, 7, 8), (5, 4, 3, 3), (1, 1), (1, 1), (1, 1), False, 1),
        ((3, 4, 8, 7), (5, 4, 3, 2), (2, 3), (1, 0), (1, 1), False, 1),  # the stride leaves rows over
        ((2, 4, 9, 9), (6, 2, 3, 3), (2, 2), (2, 2), (2, 2), False, 2),
        ((2, 6, 6, 6), (6, 1, 3, 3), (2, 2), (1, 1), (1, 1), False, 6),  # depthwise
        ((3, 4, 9), (5, 4, 4), (3,), (1,), (1,), False, 1),
        ((2, 4, 5, 5), (4, 3, 3, 3), (2, 2), (1, 1), (1, 1), True, 1),
        ((2, 4, 5, 5), (4, 3, 3, 3), (1, 1), (0, 0), (2, 2), True, 2),
    ],
)
def test_gradients_of_convolutions(
    shape: tuple[int, ...],
    weight: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    transposed: bool,
    groups: int,
) -> None:
    x, w = torch.randn(shape).double(), torch.randn(weight).double()
    rest = (stride, padding, dilation, transposed, [0] * len(stride), groups)
    grad = torch.randn_like(aten.convolution(x, w, None, *rest))
    sizes = [grad.shape[1]]
    wanted = aten.convolution_backward(grad, x, w, sizes, *rest, [True] * 3)
    found = decompositions.convolution_backward(grad, x, w, sizes, *rest, [True] * 3)
    for a, b in zip(wanted, found, strict=True):
        assert b is not None
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert decompositions.convolution_backward(grad, x, w, sizes, *rest, [False, True, False])[0] is None


@pytest.mark.parametrize("shape", [(6, 4, 5, 3), (6, 4)])
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_in_training(shape: tuple[int, ...], affine: bool) -> None:
    """The trap: by the exporter's translation it would normalise with the running statistics."""
    x = 3 + 2 * torch.randn(shape).double()
    weight, bias = (torch.randn(4).double(), torch.randn(4).double()) if affine else (None, None)
    mean, var = torch.randn(4).double(), torch.rand(4).double()
    wanted = aten._native_batch_norm_legit_functional(x, weight, bias, mean, var, True, 0.1, 1e-5)
    found = decompositions.batch_norm(x, weight, bias, mean, var, True, 0.1, 1e-5)
    for a, b in zip(wanted, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    held = mean.clone(), var.clone()
    in_place = decompositions.batch_norm_in_place(x, weight, bias, *held, True, 0.1, 1e-5)
    torch.testing.assert_close(in_place[0], wanted[0])
    torch.testing.assert_close(held, (wanted[3], wanted[4]))


def gradients(function: Any, *inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Gradients of a function by autograd, and the gradient of its result that they belong to."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    result = function(*leaves)
    grad = torch.randn_like(result)
    return grad, torch.autograd.grad(result, leaves, grad)


def test_max_pooling() -> None:
    x = torch.randn(2, 3, 7, 7).double()
    options: tuple[Any, ...] = ([3, 3], [2, 2], [1, 1], [1, 1], False)
    grad, (wanted,) = gradients(lambda v: aten.max_pool2d_with_indices(v, *options)[0], x)
    indices = aten.max_pool2d_with_indices(x, *options)[1]
    function: Any = decompositions.max_pool2d_backward
    torch.testing.assert_close(function(grad, x, *options, indices), wanted)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "include"), [([2, 2], [], [0, 0], True), ([3, 3], [2, 2], [1, 1], True)]
)
def test_average_pooling(kernel: list[int], stride: list[int], padding: list[int], include: bool) -> None:
    x = torch.randn(2, 3, 7, 8).double()
    options: Any = (kernel, stride, padding, False, include, None)
    grad, (wanted,) = gradients(lambda v: aten.avg_pool2d(v, *options), x)
    torch.testing.assert_close(decompositions.avg_pool2d_backward(grad, x, *options), wanted)


@pytest.mark.parametrize("causal", [False, True])
def test_attention(causal: bool) -> None:
    q, k, v = (torch.randn(2, 3, 5, 4).double() for _ in range(3))

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

    grad, wanted = gradients(reference, q, k, v)
    out, lse = decompositions.attention(q, k, v, 0.0, causal)
    torch.testing.assert_close(out, reference(q, k, v))
    found = decompositions.attention_backward(grad, q, k, v, out, lse, 0.0, causal)
    torch.testing.assert_close(found, wanted)


def test_lerp_is_exact_at_both_ends() -> None:
    a, b = torch.randn(100), torch.randn(100)
    for weight in (0.3, 0.7):
        torch.testing.assert_close(decompositions.lerp(a, b, weight), torch.lerp(a, b, weight))
        torch.testing.assert_close(decompositions.lerp(a, b, torch.tensor(weight)), torch.lerp(a, b, weight))
    for weight, end in ((0.0, a), (1.0, b)):
        assert torch.equal(decompositions.lerp(a, b, weight), end)
        assert torch.equal(decompositions.lerp(a, b, torch.tensor(weight)), end)


def test_a_change_of_strides_is_written_back_whole_or_refused() -> None:
    x, source = torch.zeros(24), torch.randn(4, 6)
    wanted = aten.as_strided_scatter(x, source, [4, 6], [6, 1])
    assert decompositions.as_strided_scatter(x, source, [4, 6], [6, 1]).equal(wanted)
    for size, stride, offset in (([4, 6], [1, 4], 0), ([2, 6], [6, 1], 0), ([2, 6], [6, 1], 12)):
        with pytest.raises(NotImplementedError, match="into a part"):
            decompositions.as_strided_scatter(x, source[: size[0]], size, stride, offset)
