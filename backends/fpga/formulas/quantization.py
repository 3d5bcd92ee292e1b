"""The operators of quantization and predictive sign gradients."""

from __future__ import annotations

from e2pass.backends.fpga.formulas.common import stream, tensor
from e2pass.backends.fpga.registry import register_cost
from e2pass.backends.fpga.workload import Alu, Reread, Work
from e2pass.cost import OpSite

ENCODE = Alu(3, 1)
"""Per element: scale, round, saturate both ways."""
ENCODE_BY_SHIFT = Alu(4, 0)
"""The same where the scale is a power of two."""
PEAK = Alu(2, 0)
"""Per element: absolute value and running maximum."""
SELECT = Alu(3, 0)
"""Per weight: absolute value, comparison with the threshold, choice."""


@register_cost("e2pass.quantize")
def quantize(site: OpSite) -> Work:
    """A maximum over the tensor sets the scale, then each element is encoded: a second read unless it fits."""
    x = tensor(site, 0)
    return stream(
        site,
        "quantize: max|x|, then encode",
        PEAK.plus(_encode(site)),
        elements=x.numel,
        reads=(x,),
        rereads=(Reread(x.bytes, x.bytes, x.saved),),
    )


@register_cost("e2pass.quantize_stochastic")
def quantize_stochastic(site: OpSite) -> Work:
    """As ``quantize``, and a random number (shift and exclusive or of a register) added to each element."""
    x = tensor(site, 0)
    return stream(
        site,
        "quantize: max|x|, then encode with random rounding",
        PEAK.plus(ENCODE).plus(Alu(3, 0)),
        elements=x.numel,
        reads=(x,),
        rereads=(Reread(x.bytes, x.bytes),),
    )


@register_cost("e2pass.quantize_running")
def quantize_running(site: OpSite) -> Work:
    """The scale is known beforehand: one pass."""
    x = tensor(site, 0)
    return stream(site, "quantize with a known scale", _encode(site), elements=x.numel, reads=(x,))


@register_cost("e2pass.msb")
def msb(site: OpSite) -> Work:
    """Rounding shift per code: add half, shift, saturate."""
    return stream(site, "msb: rounding shift", Alu(3, 0))


@register_cost("e2pass.threshold")
def threshold(site: OpSite) -> Work:
    """The largest magnitude of the predicted gradient, times beta."""
    return stream(site, "threshold: max|g_msb|", PEAK, elements=tensor(site, 0).numel)


@register_cost("e2pass.select")
def select(site: OpSite) -> Work:
    """Predicted or full gradient per weight."""
    out = site.outputs[0]
    return stream(site, "select: compare and choose", SELECT, elements=out.numel, writes=(out,))


@register_cost("e2pass.sparsify")
def sparsify(site: OpSite) -> Work:
    """Predicted gradient or zero per weight."""
    return stream(site, "sparsify: compare and choose", SELECT)


@register_cost("e2pass.sign")
def sign(site: OpSite) -> Work:
    """The sign bit and a test for zero per weight."""
    return stream(site, "sign", Alu(1, 0))


def _encode(site: OpSite) -> Alu:
    """``power_of_two`` is the only bool of these schemas."""
    return ENCODE_BY_SHIFT if any(argument is True for argument in site.args) else ENCODE
