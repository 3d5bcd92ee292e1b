"""Execution of a lowered region: forward and backward graphs under one ``autograd.Function``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from e2pass.errors import E2PassError
from e2pass.lowering import Halves, Joint, partition
from e2pass.runtime.fusion import fuse

CountSink = Callable[[str, Tensor], None]


class CompiledRegion:
    """A joint graph and its halves, ready to be called with tensors.

    Attributes:
        joint: The rewritten joint graph.
        halves: Its partition.
    """

    def __init__(self, joint: Joint, *, compile: bool = False) -> None:
        self.joint = joint
        self.halves: Halves = partition(joint)
        run = fuse if compile else _as_it_is
        self.forward: Callable[..., Any] = run(self.halves.forward)
        self.inference: Callable[..., Any] = run(self.halves.inference)
        self.backward = _consuming(run(self.halves.backward))
        positions = {key: i for i, key in enumerate(self.halves.forward_inputs)}
        shadows = [key for kind, key in self.halves.backward_outputs if kind == "predicted"]
        self.shadows = [("param", key) for key in shadows]
        self._grad_slot = {
            index: positions[key] if kind == "grad" else len(positions) + shadows.index(key)
            for index, (kind, key) in enumerate(self.halves.backward_outputs)
            if kind in ("grad", "predicted")
        }
        self._n_inputs = len(positions) + len(shadows)
        kinds = [kind for kind, _ in self.halves.forward_outputs]
        self._side = [i for i, kind in enumerate(kinds) if kind != "output"]
        self._values = [i for i, kind in enumerate(kinds) if kind == "output"]
        self.side_keys = [self.halves.forward_outputs[i] for i in self._side]

    def __call__(
        self, tensors: Sequence[Tensor], shadows: Sequence[Tensor], on_counts: CountSink
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Run the region; differentiable where grad mode is on.

        Args:
            tensors: One per ``halves.forward_inputs``.
            shadows: One per ``self.shadows``: alias of a weight whose gradient is the predicted one.
            on_counts: Receives ``(weight, counts)`` in backward.

        Returns:
            The region's outputs, and the side results (new buffer values, scales) in the order of ``side_keys``.
        """
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            results = _Region.apply(self, on_counts, len(tensors), *tensors, *shadows)  # type: ignore[no-untyped-call]
            n = len(self._values)
            return list(results[:n]), list(results[n:])
        with torch.no_grad():
            results = self.inference(*tensors)
        return [results[i] for i in self._values], [results[i] for i in self._side]

    def in_order(self, gradients: Sequence[Tensor]) -> list[Tensor | None]:
        """Results of the backward half as one gradient per forward input and shadow, None where there is none."""
        ordered: list[Tensor | None] = [None] * self._n_inputs
        for index, slot in self._grad_slot.items():
            ordered[slot] = gradients[index]
        return ordered


class _Region(torch.autograd.Function):
    """Saves what the partition says and nothing else, and lets go of it as backward proceeds; no double backward."""

    @staticmethod
    def forward(ctx: Any, region: CompiledRegion, on_counts: CountSink, n: int, *tensors: Tensor) -> Any:
        halves = region.halves
        results = region.forward(*tensors[:n])
        n_out = len(halves.forward_outputs)
        saved = results[n_out:]
        ctx.save_for_backward(*saved[: halves.saved_tensors])
        ctx.ints = saved[halves.saved_tensors :]
        ctx.region, ctx.on_counts = region, on_counts
        values = [results[i] for i in region._values]
        side = [results[i] for i in region._side]
        ctx.mark_non_differentiable(*side, *(v for v in values if not v.is_floating_point()))
        return (*values, *side)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise E2PassError(
                "a lowered region has no second derivative; transform with psg=None and bits=None for double backward"
            )
        region: CompiledRegion = ctx.region
        halves = region.halves
        saved = ctx.saved_tensors
        ctx.maybe_clear_saved_tensors()  # unless the caller retains the graph
        tangents = [
            _in_traced_layout(grads[i], spec) for i, spec in zip(halves.tangents, halves.tangent_specs, strict=True)
        ]
        arguments = [*saved, *ctx.ints, *tangents]
        del saved, tangents, grads
        results = region.backward(arguments)
        for result, (kind, key) in zip(results, halves.backward_outputs, strict=True):
            if kind == "counts":
                ctx.on_counts(key, result)
        return (None, None, None, *region.in_order(results))


def _as_it_is(half: fx.GraphModule) -> fx.GraphModule:
    return half


def _consuming(half: fx.GraphModule) -> Callable[[list[Any]], Any]:
    """The half as a function of one list, which it empties: a saved tensor is free once nothing reads it any more."""
    graph = fx.Graph()
    arguments = graph.placeholder("arguments")
    known: dict[fx.Node, fx.Node] = {}
    for node in half.graph.find_nodes(op="placeholder"):
        known[node] = graph.call_method("pop", (arguments, 0))
    graph.output(graph.graph_copy(half.graph, known))
    return fx.GraphModule(half, graph)


def _in_traced_layout(grad: Tensor, spec: Tensor) -> Tensor:
    """Bring an incoming gradient into the stride order that backward was traced with."""
    order = sorted(range(spec.dim()), key=lambda d: _hint(spec.stride(d)))
    strides, step = [0] * spec.dim(), 1
    for d in order:
        strides[d] = step
        step *= grad.shape[d]
    if all(have == want or n <= 1 for have, want, n in zip(grad.stride(), strides, grad.shape, strict=True)):
        return grad
    return torch.empty_strided(grad.shape, strides, dtype=grad.dtype, device=grad.device).copy_(grad)


def _hint(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint)
