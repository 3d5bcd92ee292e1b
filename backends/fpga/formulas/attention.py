"""Fused scaled dot product attention: scores stay on the chip."""

from __future__ import annotations

from e2pass.backends.fpga.formulas.common import EXP, MULTIPLY, saved, size, tensor
from e2pass.backends.fpga.registry import register_cost
from e2pass.backends.fpga.workload import Alu, Product, Work
from e2pass.cost import OpSite, TensorSpec

SOFTMAX = EXP.plus(Alu(4, 2))
"""Per score: scale, mask, maximum, difference, exponential, sum, normalise."""

_KINDS = "flash_attention flash_attention_for_cpu efficient_attention cudnn_attention fused_attention_overrideable"
FORWARD = tuple(f"aten._scaled_dot_product_{kind}" for kind in _KINDS.split())
BACKWARD = tuple(f"{name}_backward" for name in FORWARD)


@register_cost(*FORWARD)
def attention(site: OpSite) -> Work:
    """``macs = batch * heads * L * S * (E + Ev)``: scores and weighted values; a causal mask is not exploited."""
    q, k, v = (tensor(site, i) for i in range(3))
    scores = _scores(q, k)
    out = site.outputs[0]
    kept = [t for t in site.outputs[1:] if len(t.shape) > 1]
    product = Product(float(scores * (q.shape[-1] + v.shape[-1])), q, _merge(k, v), out, _pairs(k))
    return Work(
        "attention: B*H*L*S*(E+Ev) MACs, scores stay on chip",
        (product,),
        read_bytes=_others(site, (q, k, v)),
        write_bytes=size(kept),
        saved_write_bytes=saved(kept),
        alu=SOFTMAX.times(scores),
    )


@register_cost(*BACKWARD)
def attention_backward(site: OpSite) -> Work:
    """``macs = batch * heads * L * S * (3 E + 2 Ev)``: scores computed again, then dV, dP, dQ and dK."""
    gy, q, k, v = (tensor(site, i) for i in range(4))
    scores = _scores(q, k)
    macs = float(scores * (3 * q.shape[-1] + 2 * v.shape[-1]))
    results = [t for t in site.outputs if t.shape]
    product = Product(macs, _merge(q, gy), _merge(k, v), _merge(*results), _pairs(k))
    return Work(
        "attention backward: B*H*L*S*(3E+2Ev) MACs, scores recomputed",
        (product,),
        read_bytes=_others(site, (gy, q, k, v)),
        saved_read_bytes=saved(site.inputs) - saved((k, v)),
        alu=SOFTMAX.plus(MULTIPLY).plus(Alu(1, 1)).times(scores),
    )


def _scores(q: TensorSpec, k: TensorSpec) -> int:
    batch, heads, length, _ = q.shape
    return batch * heads * length * k.shape[-2]


def _pairs(k: TensorSpec) -> int:
    """Independent (batch, key head) pairs; query heads that share a key head are mapped together."""
    return max(1, k.shape[0] * k.shape[1])


def _merge(*tensors: TensorSpec) -> TensorSpec:
    """One operand with the elements of all ``tensors``, as wide as the widest."""
    every = all(t.saved for t in tensors)
    return TensorSpec((sum(t.numel for t in tensors),), max(t.bits for t in tensors), every)


def _others(site: OpSite, done: tuple[TensorSpec, ...]) -> float:
    """Bytes of the operands beside those that the array reads: masks, saved outputs and log-sums."""
    return size(site.inputs) - size(done)
