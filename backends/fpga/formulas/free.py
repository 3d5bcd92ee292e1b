"""Operators declared free: those that move no bytes on the board."""

from __future__ import annotations

import operator

from e2pass.backends.fpga.registry import declare_free, register_cost
from e2pass.cost import Free, OpSite, Unsupported


def _aten(names: str) -> list[str]:
    return [f"aten.{name}" for name in names.split()]


declare_free(
    "a view: the same bytes seen with another shape or order",
    *_aten(
        "view _unsafe_view _reshape_alias expand permute transpose t unsqueeze squeeze slice select alias detach "
        "as_strided diagonal unbind split split_with_sizes unsafe_split unsafe_split_with_sizes unsafe_chunk chunk "
        "unfold narrow movedim view_as lift lift_fresh view_as_real view_as_complex"
    ),
)
declare_free(
    "memory is set aside, nothing is written",
    *_aten("empty empty_like empty_strided empty_permuted new_empty new_empty_strided"),
)
declare_free(
    "a number about a shape, known to the host",
    *_aten("sym_size sym_stride sym_numel sym_storage_offset sym_is_contiguous sym_constrain_range"),
    *_aten("sym_constrain_range_for_size size stride numel dim"),
)
declare_free(
    "a check of the host program, not part of the computation on the board",
    *_aten("_assert_async _assert_scalar _assert_tensor_metadata"),
)
declare_free(
    "picks one of several results, which stay where they are",
    "<built-in function getitem>",
    "_operator.getitem",
    "operator.getitem",
)
declare_free(
    "the array consumes integer codes directly; turning them back into floats is an artefact of the emulation",
    "e2pass.dequantize",
)
declare_free("a constant, known to the board beforehand", "e2pass.fixed_threshold")
declare_free("a statistic of the emulation, which the board does not keep", "e2pass.agreement")

_ARITHMETIC = ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pow", "eq", "ne", "lt", "le", "gt", "ge")


@register_cost(*(str(getattr(operator, name)) for name in _ARITHMETIC), *(f"_operator.{name}" for name in _ARITHMETIC))
def size_arithmetic(site: OpSite) -> Free | Unsupported:
    """Python arithmetic is free on sizes; on tensors it should have been lowered to an ATen operator."""
    if site.inputs:
        return Unsupported(f"{site.op} on tensors has not been lowered to an ATen operator")
    return Free("arithmetic on sizes, done by the host")
