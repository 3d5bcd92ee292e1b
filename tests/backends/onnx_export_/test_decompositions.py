"""Backward operators rewritten for ONNX, against PyTorch's own kernels in double precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

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


class Decomposed(TorchDispatchMode):
    """Executes the operators of the table by their decompositions."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.inside: set[Any] = set()
        self.used: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in decompositions.TABLE or func in self.inside:
            return func(*args, **(kwargs or {}))
        self.inside.add(func)
        with self:
            result = decompositions.TABLE[func](*args, **(kwargs or {}))
        self.inside.remove(func)
        if result is NotImplemented:
            return func(*args, **(kwargs or {}))
        self.used.add(func.overloadpacket.__name__)
        return result


def assert_decomposes(function: Any, *shape: int, uses: str) -> None:
    x = torch.randn(*shape).double()
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    wanted = function(leaf)
    grad = torch.randn_like(wanted)
    with Decomposed() as mode:
        found = function(other)
        (gradient,) = torch.autograd.grad(found, other, grad)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted, leaf, grad)[0], rtol=1e-10, atol=1e-10)
    assert uses in mode.used


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(2, 2, 0), (3, 2, 1), ((3, 2), (2, 3), (1, 0)), (2, 2, 1)])
def test_pooling(kernel: Any, stride: Any, padding: Any, ceil_mode: bool) -> None:
    place = (kernel, stride, padding)
    for include in (True, False):
        for divisor in (None, 5):
            assert_decomposes(
                lambda x, i=include, d=divisor: functional.avg_pool2d(x, *place, ceil_mode, i, d),
                *(2, 3, 9, 10),
                uses="avg_pool2d_backward",
            )
    assert_decomposes(
        lambda x: functional.max_pool2d(x, *place, ceil_mode=ceil_mode),
        *(2, 3, 9, 10),
        uses="max_pool2d_with_indices_backward",
    )
    if isinstance(kernel, int):
        assert_decomposes(
            lambda x: functional.avg_pool3d(x, *place, ceil_mode, False), 2, 3, 5, 6, 4, uses="avg_pool3d_backward"
        )
        assert_decomposes(
            lambda x: functional.max_pool3d(x, *place, ceil_mode=ceil_mode),
            *(2, 3, 5, 6, 4),
            uses="max_pool3d_with_indices_backward",
        )


@pytest.mark.parametrize("shape", [(2, 3, 9, 10), (3, 9, 10)])
@pytest.mark.parametrize("size", [(4, 3), (3, 5), (12, 13)])
def test_adaptive_pooling(size: tuple[int, int], shape: tuple[int, ...]) -> None:
    assert_decomposes(lambda x: functional.adaptive_avg_pool2d(x, size), *shape, uses="_adaptive_avg_pool2d_backward")
    assert_decomposes(lambda x: functional.adaptive_max_pool2d(x, size), *shape, uses="adaptive_max_pool2d_backward")
    deep = (*size, 3)
    assert_decomposes(
        lambda x: functional.adaptive_avg_pool3d(x, deep), *shape, 4, uses="_adaptive_avg_pool3d_backward"
    )
    assert_decomposes(lambda x: functional.adaptive_max_pool3d(x, deep), *shape, 4, uses="adaptive_max_pool3d_backward")


@pytest.mark.parametrize("options", [{"scale_factor": 2}, {"size": (13, 7)}, {"scale_factor": (1.5, 0.7)}])
@pytest.mark.parametrize(
    ("mode", "operator"),
    [
        ("nearest", "upsample_nearest2d_backward"),
        ("nearest-exact", "_upsample_nearest_exact2d_backward"),
        ("bilinear", "upsample_bilinear2d_backward"),
        ("bicubic", "upsample_bicubic2d_backward"),
    ],
)
def test_interpolation(mode: str, operator: str, options: dict[str, Any]) -> None:
    corners = [None] if mode.startswith("nearest") else [False, True]
    for align in corners:
        assert_decomposes(
            lambda x, a=align: functional.interpolate(x, mode=mode, align_corners=a, **options),
            *(2, 3, 9, 10),
            uses=operator,
        )
    if mode.startswith("bi"):
        assert_decomposes(
            lambda x: functional.interpolate(x, size=(4, 5), mode=mode, antialias=True),
            *(2, 3, 9, 10),
            uses=f"_upsample_{mode}2d_aa_backward",
        )


@pytest.mark.parametrize("offset", [-2, 0, 3])
def test_views_that_backward_writes_through(offset: int) -> None:
    assert_decomposes(lambda x: x.diagonal(offset, 1, -1), 2, 5, 7, uses="diagonal_backward")
    assert_decomposes(
        lambda x: torch.diagonal_scatter(x * 2, x.diagonal(offset, 1, 2), offset, 1, 2),
        *(2, 5, 7),
        uses="diagonal_scatter",
    )
    assert_decomposes(lambda x: x.unfold(1, 3, 2), 2, 9, 4, uses="unfold_backward")
    assert_decomposes(
        lambda x: functional.pad(x, (2, 1, 1, 3), mode="replicate"), 2, 3, 5, 6, uses="replication_pad2d_backward"
    )
    assert_decomposes(functional.hardshrink, 20, uses="hardshrink_backward")
    assert_decomposes(functional.softshrink, 20, uses="softshrink_backward")


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
