"""The own operators of quantization and PSG, as ``torch.library`` ops that show by name in every graph.

Codes are symmetric integers: ``value = code * scale`` with zero exact and ``|code| <= 2^(bits-1) - 1``. The kernels
emulate the integer arithmetic of the hardware with float and integer tensor operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LIB = torch.library.Library("e2pass", "DEF")

# In frozen evaluation, a running scale of exactly 0 means "no batch seen yet": the batch's own scale is used.
_UNSEEN = 0.0


def code_dtype(bits: int) -> torch.dtype:
    """Return the narrowest integer dtype that holds symmetric codes of ``bits`` bits (at most 16)."""
    return torch.int8 if bits <= 8 else torch.int16


def quantize(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Quantize ``x`` to symmetric integer codes with one scale for the tensor, rounding to nearest even.

    Args:
        x: Floating tensor of any shape.
        bits: Width of the codes, 2 to 16.

    Returns:
        ``codes`` of the shape of ``x`` and the 0-d ``scale`` in the dtype of ``x``; an all-zero tensor has scale 1.
    """
    return _encode(x, bits, _scale(x, bits))


def quantize_running(x: Tensor, bits: int, running: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize ``x`` with the frozen 0-d scale ``running``, saturating; with its own scale while ``running`` is 0."""
    scale = torch.where(running == _UNSEEN, _scale(x, bits), running.to(x.dtype))
    return _encode(x, bits, scale)


def _scale(x: Tensor, bits: int) -> Tensor:
    if x.numel() == 0:
        return x.new_ones(())
    low, high = torch.aminmax(x)
    peak = torch.maximum(high, -low)
    return torch.where(peak == 0, 1.0, peak / (2 ** (bits - 1) - 1))


def _encode(x: Tensor, bits: int, scale: Tensor) -> tuple[Tensor, Tensor]:
    limit = 2 ** (bits - 1) - 1
    return (x / scale).round_().clamp_(-limit, limit).to(code_dtype(bits)), scale


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """Return ``codes * scale`` in the dtype of ``scale``: what the integer datapath computes with."""
    return codes.to(scale.dtype).mul_(scale)


def msb(codes: Tensor, scale: Tensor, bits: int, keep: int) -> tuple[Tensor, Tensor]:
    """Round integer codes to their ``keep`` most significant bits, half up, saturating.

    Args:
        codes: Codes of ``bits`` bits.
        scale: Their 0-d scale.
        bits: Width of ``codes``.
        keep: Width of the result, at most ``bits``.

    Returns:
        Codes of ``keep`` bits in two's complement range and their scale ``scale * 2^(bits-keep)``.
    """
    shift = bits - keep
    if shift == 0:
        return codes.clone(), scale.clone()
    high = (codes.to(torch.int32) + (1 << (shift - 1))) >> shift
    return high.clamp_(max=2 ** (keep - 1) - 1).to(code_dtype(keep)), scale * float(1 << shift)


def threshold(g_msb: Tensor, beta: float) -> Tensor:
    """Return the adaptive threshold ``tau = beta * max|g_msb|`` of one weight (paper, section 3.3), 0-d."""
    return g_msb.abs().amax() * beta


def select(g_msb: Tensor, g: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """Take the predicted gradient where it is confident, the full one elsewhere (paper, eq. of section 3.3).

    Args:
        g_msb: Predicted weight gradient.
        g: Full weight gradient, same shape.
        tau: 0-d threshold.

    Returns:
        The selected gradient, and three counts as a float64 vector: elements predicted, predicted with the sign of
        the full gradient, all.
    """
    predicted = g_msb.abs() >= tau
    agree = predicted & (torch.sign(g_msb) == torch.sign(g))
    counts = torch.stack([predicted.sum(), agree.sum(), torch.full((), g.numel(), dtype=torch.int64)]).double()
    return torch.where(predicted, g_msb, g), counts


def _empty_codes(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=code_dtype(bits)), x.new_empty(())


def _define(schema: str, kernel: object, fake: object) -> None:
    name = schema.split("(", maxsplit=1)[0]
    _LIB.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIB.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"e2pass::{name}", fake, lib=_LIB)  # type: ignore[arg-type]


_define("quantize(Tensor x, int bits) -> (Tensor, Tensor)", quantize, _empty_codes)
_define(
    "quantize_running(Tensor x, int bits, Tensor running) -> (Tensor, Tensor)",
    quantize_running,
    lambda x, bits, running: _empty_codes(x, bits),
)
_define(
    "dequantize(Tensor codes, Tensor scale) -> Tensor",
    dequantize,
    lambda codes, scale: torch.empty_like(codes, dtype=scale.dtype),
)
_define(
    "msb(Tensor codes, Tensor scale, int bits, int keep) -> (Tensor, Tensor)",
    msb,
    lambda codes, scale, bits, keep: (torch.empty_like(codes, dtype=code_dtype(keep)), torch.empty_like(scale)),
)
_define("threshold(Tensor g_msb, float beta) -> Tensor", threshold, lambda g_msb, beta: g_msb.new_empty(()))
_define(
    "select(Tensor g_msb, Tensor g, Tensor tau) -> (Tensor, Tensor)",
    select,
    lambda g_msb, g, tau: (torch.empty_like(g), g.new_empty((3,), dtype=torch.float64)),
)
