"""Backward operators, and training-mode norms, in terms of operators that ONNX has.

Why these are written here: torch's exporter has no translation of them, or a wrong one. In particular it writes a
batch norm in training mode as ONNX's ``BatchNormalization`` of inference, which normalises by other statistics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from e2pass.backends.onnx_export import pooling, resampling
from e2pass.runtime import bit_true

aten = torch.ops.aten


def convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of a convolution, as convolutions.

    dX is the transposed convolution of the gradient with the weight. dW is the convolution of the input with the
    gradient, channels and samples exchanged, stride and dilation too. For a transposed convolution the input and the
    gradient change their parts.
    """
    n = x.dim() - 2
    stride, padding, dilation = (list(v) * (n // len(v)) for v in (stride, padding, dilation))
    dx = dw = db = None
    if output_mask[0] and transposed:
        dx = aten.convolution(grad, weight, None, stride, padding, dilation, False, [0] * n, groups)
    elif output_mask[0]:
        kernel = weight.shape[2:]
        missing = [
            x.shape[2 + i] - ((grad.shape[2 + i] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (kernel[i] - 1) + 1)
            for i in range(n)
        ]
        dx = aten.convolution(grad, weight, None, stride, padding, dilation, True, missing, groups)
    if output_mask[1]:
        data, kernel_data = (grad, x) if transposed else (x, grad)
        dw = _weight_gradient(data, kernel_data, weight.shape[2:], stride, padding, dilation, groups)
    if output_mask[2]:
        db = grad.sum([0, *range(2, 2 + n)])
    return dx, dw, db


def _weight_gradient(
    x: Tensor,
    grad: Tensor,
    kernel: Sequence[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    n = len(kernel)
    if groups == 1:
        data = x.transpose(0, 1)
    else:  # (B, G C, ...) to (C, G B, ...): each group is a group of the convolution that computes dW
        data = x.unflatten(1, (groups, -1)).permute(2, 1, 0, *range(3, 3 + n)).flatten(1, 2)
    swapped = aten.convolution(data, grad.transpose(0, 1), None, dilation, padding, stride, False, [0] * n, groups)
    for i, size in enumerate(kernel):  # rows that the stride left over
        swapped = aten.slice(swapped, 2 + i, 0, size)
    result: Tensor = swapped.transpose(0, 1).contiguous()
    return result


def layer_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> Any:
    """``aten::native_layer_norm`` in double precision: ONNX's own returns mean and deviation in single."""
    if x.dtype != torch.float64:
        return NotImplemented
    axes = list(range(x.dim() - len(shape), x.dim()))
    mean = x.mean(axes, keepdim=True)
    centred = x - mean
    invstd = torch.rsqrt((centred * centred).mean(axes, keepdim=True) + eps)
    out = centred * invstd
    out = out * weight if weight is not None else out
    return out + bias if bias is not None else out, mean, invstd


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """``aten::_native_batch_norm_legit_functional`` as mean and variance arithmetic."""
    axes = [0, *range(2, x.dim())]
    view = [1, -1, *[1] * (x.dim() - 2)]
    if not training:
        assert running_mean is not None
        assert running_var is not None
        invstd = torch.rsqrt(running_var + eps)
        out = _affine(x, running_mean, invstd, weight, bias, view)
        return out, x.new_zeros(0), x.new_zeros(0), running_mean, running_var
    mean = x.mean(axes)
    centred = x - mean.view(view)
    var = (centred * centred).mean(axes)
    invstd = torch.rsqrt(var + eps)
    out = _affine(x, mean, invstd, weight, bias, view)
    if running_mean is not None and running_var is not None:
        count = x.shape[0] * math.prod(x.shape[2:])
        unbiased = var * (count / (count - 1))
        running_mean = momentum * mean + (1 - momentum) * running_mean
        running_var = momentum * unbiased + (1 - momentum) * running_var
    return out, mean, invstd, running_mean, running_var


def _affine(
    x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None, view: list[int]
) -> Tensor:
    out = (x - mean.view(view)) * invstd.view(view)
    if weight is not None:
        out = out * weight.view(view)
    return out if bias is None else out + bias.view(view)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """``aten::_scaled_dot_product_flash_attention_for_cpu``: the result and the log-sum-exp of the scores."""
    if dropout_p:
        raise NotImplementedError("attention with dropout")
    scores = _scores(query, key, is_causal, attn_mask, scale)
    lse = torch.logsumexp(scores, -1)
    out: Tensor = aten.copy(torch.empty_like(query), torch.softmax(scores, -1) @ value)  # in the query's layout
    return out, lse


def attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value (Dao et al. 2022, "FlashAttention", algorithm 4, in one tile)."""
    if dropout_p:
        raise NotImplementedError("attention with dropout")
    weights = torch.exp(_scores(query, key, is_causal, attn_mask, scale) - logsumexp.unsqueeze(-1))
    d_weights = grad @ value.transpose(-2, -1)
    d_scores = weights * (d_weights - (grad * out).sum(-1, keepdim=True)) * _factor(query, scale)
    d_key, d_value = d_scores.transpose(-2, -1) @ query, weights.transpose(-2, -1) @ grad
    return _heads_inside(d_scores @ key), _heads_inside(d_key), _heads_inside(d_value)


def _heads_inside(x: Tensor) -> Tensor:
    """(B, heads, T, width) with the memory layout of the kernel, where a token's heads lie side by side."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _factor(query: Tensor, scale: float | None) -> float:
    return float(query.shape[-1]) ** -0.5 if scale is None else scale


def _scores(query: Tensor, key: Tensor, is_causal: bool, mask: Tensor | None, scale: float | None) -> Tensor:
    scores = (query @ key.transpose(-2, -1)) * _factor(query, scale)
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~allowed, float("-inf"))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores


def lerp(start: Tensor, end: Tensor, weight: Tensor | float) -> Tensor:
    """The formula of PyTorch's kernel, which is exact at both ends."""
    if isinstance(weight, Tensor):
        near = start + weight * (end - start)
        return torch.where(weight.abs() < 0.5, near, end - (end - start) * (1 - weight))
    return start + weight * (end - start) if abs(weight) < 0.5 else end - (end - start) * (1 - weight)


def split(x: Tensor, size: int, dim: int = 0) -> list[Tensor]:
    """As slices: ONNX's ``SplitToSequence`` would make a sequence of them."""
    return [aten.slice(x, dim, start, min(start + size, x.shape[dim])) for start in range(0, x.shape[dim], size)]


def as_strided_scatter(
    x: Tensor, source: Tensor, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None
) -> Tensor:
    """The source, where it fills a contiguous tensor in order; backward of a change of strides writes so."""
    in_order = list(stride) == [math.prod(size[i + 1 :]) for i in range(len(size))]
    if not x.is_contiguous() or not in_order or math.prod(size) != x.numel() or storage_offset:
        raise NotImplementedError("writing into a part of a tensor by strides")
    return source.reshape(x.shape)


def shrink_backward(grad: Tensor, x: Tensor, lambd: float) -> Tensor:
    """The gradient where the input is beyond the threshold."""
    return torch.where(x.abs() <= lambd, 0.0, grad)


def weight_norm_backward(grad: Tensor, v: Tensor, g: Tensor, norms: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """PyTorch's own formula of the same in differentiable operators."""
    result: tuple[Tensor, Tensor] = aten._weight_norm_differentiable_backward(grad, v, g, norms, dim)
    return result


def diagonal_scatter(x: Tensor, source: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Tensor:
    """The source on a diagonal, without a write through a view of it."""
    moved = x.movedim((dim1, dim2), (-2, -1))
    rows, columns = (torch.arange(n, device=x.device) for n in moved.shape[-2:])
    above = max(-offset, 0)
    lines = aten.constant_pad_nd(source, [above, moved.shape[-2] - source.shape[-1] - above]).unsqueeze(-1)
    on_it = columns - rows.unsqueeze(1) == offset
    return torch.where(on_it, lines, moved).movedim((-2, -1), (dim1, dim2))


def diagonal_backward(grad: Tensor, input_sizes: Sequence[int], offset: int, dim1: int, dim2: int) -> Tensor:
    """The gradient on the diagonal, and zeros."""
    return diagonal_scatter(grad.new_zeros(input_sizes), grad, offset, dim1, dim2)


def unfold_backward(grad: Tensor, input_sizes: Sequence[int], dim: int, size: int, step: int) -> Tensor:
    """The sum of what all windows say of each element."""
    dim %= len(input_sizes)
    windows = grad.movedim(dim, -2).flatten(-2)
    position = torch.arange(grad.shape[dim], device=grad.device).unsqueeze(1) * step
    index = (position + torch.arange(size, device=grad.device)).flatten().expand(windows.shape)
    zeros = grad.new_zeros((*windows.shape[:-1], input_sizes[dim]))
    return zeros.scatter_add(-1, index, windows).movedim(-1, dim)


def mean_of_bags(bags: Callable[..., Any]) -> Callable[..., Any]:
    """An ``aten`` operator of embedding bags in mode 1, the mean, by its sum: onnxruntime 1.32 crashes on its form."""

    def decomposition(weight: Tensor, indices: Tensor, offsets: Tensor, *settings: Any) -> Any:
        given: list[Any] = [*settings, *(False, 0, False, None, False, -1)[len(settings) :]]
        by_frequency, mode, sparse, weights, last, padding = given
        if mode != 1:
            return NotImplemented
        if last or padding not in (None, -1):
            raise NotImplementedError("embedding_bag with mode='mean' and padding_idx")
        sums, *rest = bags(weight, indices, offsets, by_frequency, 0, sparse, weights, last, padding)
        ends = torch.cat([offsets[1:], torch.full_like(offsets[:1], indices.shape[0])])
        return (sums / (ends - offsets).clamp(min=1).unsqueeze(1).to(sums.dtype), *rest)

    return decomposition


def batch_norm_in_place(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``aten::native_batch_norm``, which updates its running statistics without saying so in its schema."""
    *results, mean, var = batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps)
    if training and running_mean is not None and running_var is not None:
        assert mean is not None
        assert var is not None
        running_mean.copy_(mean)
        running_var.copy_(var)
    out, saved_mean, invstd = results
    return out, saved_mean, invstd


TABLE: dict[Any, Callable[..., Any]] = {
    aten.convolution_backward.default: convolution_backward,
    aten._native_batch_norm_legit_functional.default: batch_norm,
    aten.native_layer_norm.default: layer_norm,
    # The exporter's translation of this one gives a total weight of 1, whatever the batch.
    aten.nll_loss_forward.default: torch._decomp.decomposition_table[aten.nll_loss_forward.default],
    # This one is translated to a function of the exporter's own domain.
    aten.addcmul.default: torch._decomp.decomposition_table[aten.addcmul.default],
    aten.lerp.Tensor: lerp,
    aten.lerp.Scalar: lerp,
    aten.as_strided_scatter.default: as_strided_scatter,
    aten.split.Tensor: split,
    aten.unsafe_split.Tensor: split,
    aten._scaled_dot_product_flash_attention_for_cpu.default: attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: attention_backward,
    aten.hardshrink_backward.default: shrink_backward,
    aten.softshrink_backward.default: shrink_backward,
    aten._weight_norm_interface_backward.default: weight_norm_backward,
    aten.diagonal_scatter.default: diagonal_scatter,
    aten.diagonal_backward.default: diagonal_backward,
    aten.unfold_backward.default: unfold_backward,
    aten.embedding_bag.padding_idx: mean_of_bags(aten.embedding_bag.padding_idx),
    aten._embedding_bag.default: mean_of_bags(aten._embedding_bag.default),
    aten._embedding_bag_forward_only.default: mean_of_bags(aten._embedding_bag_forward_only.default),
    **pooling.TABLE,
    **resampling.TABLE,
    **bit_true.DECOMPOSITIONS,
}
"""Operators to their decompositions; they take precedence over torch's and over the exporter's translations."""

IN_PLACE: dict[Any, Callable[..., Any]] = {
    aten.native_batch_norm.default: batch_norm_in_place,
    aten._native_batch_norm_legit.default: batch_norm_in_place,
}
"""Likewise, of what has to be decomposed before a graph's mutations are removed."""
