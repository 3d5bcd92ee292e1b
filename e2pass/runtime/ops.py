"""The own operators of quantization and PSG, as ``torch.library`` ops that show by name in every graph.

Codes are symmetric integers: ``value = code * scale`` with zero exact and ``|code| <= 2^(bits-1) - 1``. The kernels
emulate the integer arithmetic of the hardware with float and integer tensor operations.

A tensor with a NaN or an infinity has the scale NaN, so all it decodes to is NaN: a product never hides one. Only a
running scale, which evaluation uses, is no part of the tensor: it saturates infinities, and codes hold no NaN.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_LIB = torch.library.Library("e2pass", "DEF")

# In frozen evaluation, a running scale of exactly 0 means "no batch seen yet": the batch's own scale is used.
_UNSEEN = 0.0


def code_dtype(bits: int) -> torch.dtype:
    """Return the narrowest integer dtype that holds symmetric codes of ``bits`` bits (at most 16).

    In a compiled loop, where they are not in memory, all are 32 bits wide: dynamo reads this code only to compile it,
    while other traces, an export's too, run the operators' fake kernels and see true widths.
    """
    if torch.compiler.is_dynamo_compiling():
        return torch.int32
    return torch.int8 if bits <= 8 else torch.int16


def quantize(x: Tensor, bits: int, axis: int | None = None, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Quantize ``x`` to symmetric integer codes, rounding to nearest even.

    Args:
        x: Floating tensor of any shape.
        bits: Width of the codes, 2 to 16.
        axis: Dimension with a scale for each of its entries; None for one scale for the tensor.
        power_of_two: Round scales up to powers of two.

    Returns:
        ``codes`` of the shape of ``x`` and ``scale`` in the dtype of ``x``, 0-d or with one dimension longer than 1;
        where all values are zero the scale is 1.
    """
    scale = _scale(x, bits, axis, power_of_two)
    return _encode(x / scale, bits, saturate=False), scale


def quantize_stochastic(x: Tensor, bits: int, axis: int | None, step: Tensor, stream: int) -> tuple[Tensor, Tensor]:
    """Quantize as ``quantize``, but round up with the probability of the fraction, so that the mean is exact.

    Args:
        x: Floating tensor of any shape.
        bits: Width of the codes.
        axis: As for ``quantize``.
        step: 0-d int64, number of the training step.
        stream: Number of the quantizer; with ``step`` it seeds a generator that no other random numbers come from.

    Returns:
        As ``quantize``.
    """
    scale = _scale(x, bits, axis)
    noise = torch.ops.e2pass.uniform(x, step, stream)
    return _encode((noise + x / scale).floor_(), bits, saturate=True), scale


def uniform(x: Tensor, step: Tensor, stream: int) -> Tensor:
    """Random numbers from 0 to 1 of the shape of ``x``, from a generator seeded with ``step`` and ``stream``."""
    generator = torch.Generator(x.device).manual_seed((int(step) * 0x9E3779B1 + stream) % 2**63)
    return torch.empty_like(x).uniform_(generator=generator)


def quantize_running(x: Tensor, bits: int, running: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Quantize ``x`` with the frozen 0-d scale ``running``, saturating; with its own scale while ``running`` is 0."""
    scale = torch.where(running == _UNSEEN, _scale(x, bits, None), running.to(x.dtype))
    scale = next_power_of_two(scale) if power_of_two else scale
    return _encode(x / scale, bits, saturate=True), scale


def next_power_of_two(scale: Tensor) -> Tensor:
    """The smallest power of two, of normal numbers, that is not less than ``scale``; NaN stays NaN.

    Args:
        scale: Positive, of any shape; beyond 2^127 the result is infinite.
    """
    normal = scale.clamp_min(torch.finfo(scale.dtype).tiny)
    mantissa = torch.frexp(normal).mantissa  # from 0.5 to 1, so the quotient is a power of two, and exact
    return torch.where(mantissa == 0.5, normal, normal / mantissa)


def _scale(x: Tensor, bits: int, axis: int | None, power_of_two: bool = False) -> Tensor:
    shape = [] if axis is None else [x.shape[d] if d == axis % x.dim() else 1 for d in range(x.dim())]
    if x.numel() == 0:
        return x.new_ones(shape)
    limit = 2 ** (bits - 1) - 1
    if axis is None:
        peak = _peak(x)
    else:
        peak = x.abs().amax([d for d in range(x.dim()) if shape[d] == 1], keepdim=True).reshape(shape)
    scale = peak / limit
    result: Tensor = scale + (scale == 0) + (peak - peak)  # 1 for 0, and NaN for infinity
    return next_power_of_two(result) if power_of_two else result


def _peak(x: Tensor) -> Tensor:
    """The largest magnitude, NaN if there is one."""
    low, high = torch.aminmax(_dense(x))
    return torch.maximum(high, -low)


def _dense(x: Tensor) -> Tensor:
    """The same elements in the order of memory: a reduction over a permuted tensor is several times slower."""
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1)
    return x


def _encode(scaled: Tensor, bits: int, *, saturate: bool) -> Tensor:
    """Round ``scaled``, which is overwritten; a tensor over its own scale cannot exceed the limit."""
    codes = scaled.round_()
    if saturate:
        limit = 2 ** (bits - 1) - 1
        codes.clamp_(-limit, limit)
    return codes.to(code_dtype(bits))


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """Return ``codes * scale`` in the dtype of ``scale``: what the integer datapath computes with."""
    return codes.to(scale.dtype).mul_(scale)


def msb(codes: Tensor, scale: Tensor, bits: int, keep: int, mode: str = "round") -> tuple[Tensor, Tensor]:
    """Reduce integer codes to their ``keep`` most significant bits.

    Args:
        codes: Codes of ``bits`` bits.
        scale: Their scale.
        bits: Width of ``codes``.
        keep: Width of the result, at most ``bits``.
        mode: ``round`` (half up, saturating), ``floor`` (the bits of the two's complement code as they are) or
            ``truncate`` (of its magnitude, towards zero).

    Returns:
        Codes of ``keep`` bits in two's complement range and their scale ``scale * 2^(bits-keep)``.
    """
    shift = bits - keep
    if shift == 0:
        return codes.clone(), scale.clone()
    if mode == "floor":
        high = codes >> shift
    elif mode == "truncate":
        high = codes.abs().bitwise_right_shift_(shift).mul_(codes.sign())
    elif shift == 1:  # adding a half first would overflow
        high = (codes >> 1).add_(codes & 1).clamp_(max=2 ** (keep - 1) - 1)
    else:
        high = (codes >> (shift - 1)).add_(1).bitwise_right_shift_(1).clamp_(max=2 ** (keep - 1) - 1)
    return high.to(code_dtype(keep)), scale * float(1 << shift)


def threshold(g_msb: Tensor, beta: float) -> Tensor:
    """Return the adaptive threshold ``tau = beta * max|g_msb|`` of one weight (paper, section 3.3), 0-d."""
    return _peak(g_msb) * beta


def fixed_threshold(g_msb: Tensor, tau: float) -> Tensor:
    """Return ``tau`` as a 0-d tensor beside ``g_msb``."""
    return g_msb.new_full((), tau)


def select(g_msb: Tensor, g: Tensor, tau: Tensor) -> Tensor:
    """Take the predicted gradient where it is confident, the full one elsewhere (paper, eq. of section 3.3).

    Args:
        g_msb: Predicted weight gradient.
        g: Full weight gradient, same shape.
        tau: 0-d threshold.
    """
    return torch.where(g_msb.abs() >= tau, g_msb, g)


def sparsify(g_msb: Tensor, tau: Tensor) -> Tensor:
    """Take the predicted gradient where it is confident, and zero elsewhere."""
    return torch.where(g_msb.abs() < tau, 0.0, g_msb)


def sign(g: Tensor) -> Tensor:
    """Return -1, 0 or 1; unlike ``torch.sign``, NaN stays NaN, so that a loss scaler or a clip still sees it."""
    return torch.where(g.isnan(), g, g.sign())


def agreement(g_msb: Tensor, g: Tensor, tau: Tensor, variance: Tensor | None = None) -> Tensor:
    """Statistics of one weight's selection.

    Args:
        g_msb: Predicted weight gradient.
        g: Full weight gradient.
        tau: 0-d threshold.
        variance: Variance of ``g - g_msb`` that uniform quantization noise gives each element; None if unknown.

    Returns:
        A float64 vector: elements predicted, predicted with the sign of the full gradient, all; and the sum over the
        predicted ones of the paper's bound on the probability of a wrong sign (Chebyshev's inequality for symmetric
        noise, ``variance / (2 g^2)``, at most 1), NaN if the variance is unknown.
    """
    predicted = g_msb.abs() >= tau
    agree = predicted & (torch.sign(g_msb) == torch.sign(g))
    if variance is None:
        bound = g.new_full((), torch.nan)
    else:
        bound = torch.where(predicted & (variance > 0), (variance / (2 * g.square())).clamp(max=1.0), 0.0).sum()
    everything = torch.full_like(bound, g.numel())
    return torch.stack([predicted.sum(), agree.sum(), everything, bound]).double()


def _empty_codes(x: Tensor, bits: int, axis: int | None = None, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    shape = [] if axis is None else [x.shape[d] if d == axis % x.dim() else 1 for d in range(x.dim())]
    return torch.empty_like(x, dtype=code_dtype(bits)), x.new_empty(shape)


KERNELS: dict[Callable[..., object], Callable[..., object]] = {}
"""The Python function of each operator, for a compiler that wants to see into it."""


def define(schema: str, kernel: Callable[..., object], fake: object, *, fusible: bool = True) -> None:
    """Register an operator of the namespace ``e2pass``.

    Args:
        schema: Its name and types.
        kernel: What computes it, on any device.
        fake: What gives shapes and types of its results.
        fusible: Whether ``Config(compile=True)`` may compile the kernel together with its neighbours.
    """
    name = schema.split("(", maxsplit=1)[0]
    _LIB.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIB.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"e2pass::{name}", fake, lib=_LIB)  # type: ignore[arg-type]
    if fusible:
        KERNELS[getattr(torch.ops.e2pass, name).default] = kernel


define("uniform(Tensor x, Tensor step, int stream) -> Tensor", uniform, lambda x, step, stream: torch.empty_like(x))
define(
    "quantize(Tensor x, int bits, int? axis=None, bool power_of_two=False) -> (Tensor, Tensor)", quantize, _empty_codes
)
define(
    "quantize_stochastic(Tensor x, int bits, int? axis, Tensor step, int stream) -> (Tensor, Tensor)",
    quantize_stochastic,
    lambda x, bits, axis, step, stream: _empty_codes(x, bits, axis),
)
define(
    "quantize_running(Tensor x, int bits, Tensor running, bool power_of_two=False) -> (Tensor, Tensor)",
    quantize_running,
    lambda x, bits, running, power_of_two=False: _empty_codes(x, bits),
)
define(
    "dequantize(Tensor codes, Tensor scale) -> Tensor",
    dequantize,
    lambda codes, scale: torch.empty_like(codes, dtype=scale.dtype),
)
define(
    'msb(Tensor codes, Tensor scale, int bits, int keep, str mode="round") -> (Tensor, Tensor)',
    msb,
    lambda codes, scale, bits, keep, mode="round": (
        torch.empty_like(codes, dtype=code_dtype(keep)),
        torch.empty_like(scale),
    ),
)
define("threshold(Tensor g_msb, float beta) -> Tensor", threshold, lambda g_msb, beta: g_msb.new_empty(()))
define("fixed_threshold(Tensor g_msb, float tau) -> Tensor", fixed_threshold, lambda g_msb, tau: g_msb.new_empty(()))
define("select(Tensor g_msb, Tensor g, Tensor tau) -> Tensor", select, lambda g_msb, g, tau: torch.empty_like(g))
define("sparsify(Tensor g_msb, Tensor tau) -> Tensor", sparsify, lambda g_msb, tau: torch.empty_like(g_msb))
define("sign(Tensor g) -> Tensor", sign, torch.empty_like)
define(
    "agreement(Tensor g_msb, Tensor g, Tensor tau, Tensor? variance=None) -> Tensor",
    agreement,
    lambda g_msb, g, tau, variance=None: g.new_empty((4,), dtype=torch.float64),
)
