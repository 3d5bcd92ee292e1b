"""Pooling and resampling, forward and backward."""

from __future__ import annotations

import math
from typing import Any

from e2pass.backends.fpga.formulas.common import arguments, stream, tensor
from e2pass.backends.fpga.registry import register_cost
from e2pass.backends.fpga.workload import Alu, Work
from e2pass.cost import OpSite


@register_cost("aten.max_pool2d_with_indices", "aten.max_pool3d_with_indices")
def max_pool(site: OpSite) -> Work:
    """One comparison per element of each window."""
    return stream(site, "max pool: |window| comparisons", Alu(_window(site, site.args[1]), 0))


@register_cost("aten.avg_pool2d", "aten.avg_pool3d", "aten.avg_pool1d")
def avg_pool(site: OpSite) -> Work:
    """One addition per element of each window, one multiplication per result."""
    return stream(site, "average pool: |window| additions", Alu(_window(site, site.args[1]), 1))


@register_cost("aten._adaptive_avg_pool2d", "aten._adaptive_avg_pool3d")
def adaptive_avg_pool(site: OpSite) -> Work:
    """Each input element is added once."""
    return stream(site, "adaptive average pool: one addition per input", Alu(1, 0), elements=tensor(site, 0).numel)


@register_cost("aten.adaptive_max_pool2d", "aten.adaptive_max_pool3d")
def adaptive_max_pool(site: OpSite) -> Work:
    """Each input element is compared once."""
    return stream(site, "adaptive max pool: one comparison per input", Alu(1, 0), elements=tensor(site, 0).numel)


@register_cost(
    "aten.max_pool2d_with_indices_backward",
    "aten.max_pool3d_with_indices_backward",
    "aten.adaptive_max_pool2d_backward",
    "aten.adaptive_max_pool3d_backward",
)
def max_pool_backward(site: OpSite) -> Work:
    """Gradients are added where the indices point; the forward input, an argument too, is not read."""
    gy = tensor(site, 0)
    reads = (gy, *arguments(site, 2))
    return stream(site, "max pool backward: scatter by index", Alu(1, 0), elements=gy.numel, reads=reads)


@register_cost("aten.avg_pool2d_backward", "aten.avg_pool3d_backward")
def avg_pool_backward(site: OpSite) -> Work:
    """Each gradient is scaled and added to its window; the forward input is not read."""
    gy = tensor(site, 0)
    per_gradient = Alu(_window(site, site.args[2]), 1)
    return stream(site, "average pool backward", per_gradient, elements=gy.numel, reads=(gy,))


@register_cost("aten._adaptive_avg_pool2d_backward", "aten._adaptive_avg_pool3d_backward")
def adaptive_avg_pool_backward(site: OpSite) -> Work:
    """Each input gradient is one scaled output gradient; the forward input is not read."""
    return stream(site, "adaptive average pool backward", Alu(0, 1), reads=(tensor(site, 0),))


_TAPS = {
    "upsample_nearest1d": 0,
    "upsample_nearest2d": 0,
    "upsample_nearest3d": 0,
    "_upsample_nearest_exact1d": 0,
    "_upsample_nearest_exact2d": 0,
    "_upsample_nearest_exact3d": 0,
    "upsample_linear1d": 2,
    "upsample_bilinear2d": 4,
    "_upsample_bilinear2d_aa": 4,
    "upsample_trilinear3d": 8,
    "upsample_bicubic2d": 16,
    "_upsample_bicubic2d_aa": 16,
    "grid_sampler_2d": 4,
    "grid_sampler_3d": 8,
}


@register_cost(*(f"aten.{name}" for name in _TAPS))
def upsample(site: OpSite) -> Work:
    """Each result is a weighted sum of so many taps (bilinear: 4); nearest only copies."""
    taps = _TAPS[site.op.split(".")[1]]
    return stream(site, f"resample: {taps} taps per result", Alu(taps, taps))


@register_cost(*(f"aten.{name}_backward" for name in _TAPS))
def upsample_backward(site: OpSite) -> Work:
    """Each output gradient is spread over so many taps (nearest: added to one)."""
    taps = _TAPS[site.op.split(".")[1].removesuffix("_backward")]
    gy = tensor(site, 0)
    return stream(site, f"resample backward: {taps} taps", Alu(max(1, taps), taps), elements=gy.numel)


def _window(site: OpSite, kernel: Any) -> float:
    """Elements of a window; one number stands for all dimensions."""
    dims = int(site.op.partition("pool")[2][0])
    sizes = tuple(kernel) if isinstance(kernel, tuple | list) else (kernel,)
    return float(math.prod(sizes if len(sizes) == dims else sizes * dims))
