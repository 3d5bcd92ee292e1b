"""Operators that move data: copies, concatenation, padding, indexing, fills and random numbers."""

from __future__ import annotations

from e2pass.backends.fpga.formulas.common import (
    LOG,
    RANDOM,
    SQRT,
    TRIGONOMETRIC,
    arguments,
    saved,
    size,
    stream,
    tensor,
)
from e2pass.backends.fpga.registry import register_cost
from e2pass.backends.fpga.workload import Alu, Work
from e2pass.cost import OpSite, TensorSpec


def _aten(names: str) -> list[str]:
    return [f"aten.{name}" for name in names.split()]


@register_cost(
    *_aten(
        "clone _to_copy contiguous lift_fresh_copy cat stack constant_pad_nd reflection_pad1d reflection_pad2d "
        "reflection_pad3d replication_pad1d replication_pad2d replication_pad3d repeat repeat_interleave tile roll "
        "flip rot90 triu tril diag_embed pixel_shuffle pixel_unshuffle channel_shuffle select_scatter slice_scatter "
        "as_strided_scatter diagonal_scatter as_strided_copy view_copy expand_copy permute_copy transpose_copy "
        "slice_copy im2col col2im _local_scalar_dense"
    )
)
def copy_all(site: OpSite) -> Work:
    """Operands are read, results written."""
    return stream(site, "copy: in + out")


@register_cost("aten.copy")
def copy_source(site: OpSite) -> Work:
    """The source is read; the destination is overwritten, not read."""
    return stream(site, "copy: in + out", reads=arguments(site, 1))


@register_cost(*_aten("select_backward slice_backward diagonal_backward unfold_backward"))
def view_backward(site: OpSite) -> Work:
    """The gradient is read and written into a result that is zero elsewhere."""
    return stream(site, "gradient of a view: in + zero-filled out")


@register_cost(*_aten("reflection_pad1d_backward reflection_pad2d_backward reflection_pad3d_backward"))
@register_cost(*_aten("replication_pad1d_backward replication_pad2d_backward replication_pad3d_backward"))
def pad_backward(site: OpSite) -> Work:
    """Each gradient is added where it came from; the forward input is not read."""
    gy = tensor(site, 0)
    return stream(site, "pad backward", Alu(1, 0), elements=gy.numel, reads=(gy,))


@register_cost(*_aten("index _unsafe_index gather index_select take masked_select"))
def gather(site: OpSite) -> Work:
    """As many elements are read as are written, and the indices."""
    out = site.outputs[0]
    indices = [t for t in site.inputs[1:]]
    picked = TensorSpec(out.shape, site.inputs[0].bits, site.inputs[0].saved)
    return stream(site, "gather: out read, indices read, out written", reads=(picked, *indices))


@register_cost("aten.embedding")
def embedding(site: OpSite) -> Work:
    """Only the rows that the indices name are read."""
    table, indices = tensor(site, 0), tensor(site, 1)
    rows = TensorSpec(site.outputs[0].shape, table.bits)
    return stream(site, "embedding: named rows read", reads=(rows, indices))


@register_cost("aten.embedding_dense_backward")
def embedding_backward(site: OpSite) -> Work:
    """The dense gradient is zero-filled, then each row's gradient is added: read, add, write."""
    gy, indices = tensor(site, 0), tensor(site, 1)
    rows = size(site.outputs) and gy.numel * site.outputs[0].bits / 8
    return Work(
        "embedding backward: zero-filled table + rows read, added, written",
        read_bytes=gy.bytes + indices.bytes + rows,
        write_bytes=size(site.outputs) + rows,
        saved_read_bytes=saved((gy, indices)),
        alu=Alu(gy.numel, 0),
    )


@register_cost(*_aten("index_put _unsafe_index_put scatter scatter_add scatter_reduce index_add index_copy"))
@register_cost(*_aten("masked_scatter put"))
def scatter(site: OpSite) -> Work:
    """The base is copied, then each value is added or put in its place: read, (add,) write."""
    base, *others = site.inputs
    values = max((t.numel for t in others), default=0)
    moved = values * base.bits / 8
    return Work(
        "scatter: base copied, values read, added, written",
        read_bytes=size(site.inputs) + moved,
        write_bytes=size(site.outputs) + moved,
        saved_read_bytes=saved(site.inputs),
        saved_write_bytes=saved(site.outputs),
        alu=Alu(values, 0),
    )


@register_cost(
    *_aten(
        "full full_like fill zeros zeros_like ones ones_like new_zeros new_ones new_full scalar_tensor arange linspace "
        "eye zero"
    )
)
def fill(site: OpSite) -> Work:
    """The result is written; a tensor argument only lends its shape."""
    return stream(site, "fill: out", reads=())


@register_cost(*_aten("rand rand_like randint randint_like randperm uniform bernoulli.p bernoulli.default"))
def uniform(site: OpSite) -> Work:
    """One random number per element; probabilities are read where they are a tensor."""
    reads = site.inputs if site.op == "aten.bernoulli.default" else ()
    return stream(site, "random numbers", RANDOM.plus(Alu(1, 1)), reads=reads)


@register_cost(*_aten("randn randn_like normal normal_functional exponential"))
def normal(site: OpSite) -> Work:
    """One random number per element and a Box-Muller transform."""
    return stream(site, "normal random numbers", RANDOM.plus(LOG).plus(SQRT).plus(TRIGONOMETRIC), reads=())
