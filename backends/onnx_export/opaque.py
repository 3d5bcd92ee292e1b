"""Bodies of gated blocks as two opaque operators, so that one trace of the training step can hold them unexecuted.

``e2pass::body`` stands for the forward half and ``e2pass::body_backward`` for the backward half of a region that runs
on the samples whose gate is open. Both take and return values of the whole batch: gathering, running and scattering
back happen inside, in the branch of an ONNX ``If``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from e2pass.plan import Region
from e2pass.runtime.region import CompiledRegion


@dataclass(frozen=True)
class Body:
    """A region as the opaque operators see it.

    Attributes:
        region: The body of a gated block.
        compiled: Its lowered form.
        training: Whether its backward half is wanted.
    """

    region: Region
    compiled: CompiledRegion
    training: bool = True

    @property
    def forward(self) -> fx.GraphModule:
        """The forward half, with what backward needs behind its outputs where that is wanted."""
        halves = self.compiled.halves
        return halves.forward if self.training else halves.inference

    def outputs(self) -> list[tuple[tuple[str, Any], fx.Node]]:
        """``(kind, key)`` and node of each result of ``e2pass::body``."""
        keys = self.compiled.halves.forward_outputs
        nodes: Any = self.forward.graph.output_node().args[0]
        return list(zip(keys, nodes[: len(keys)], strict=True))

    def gradients(self) -> list[tuple[tuple[str, Any], fx.Node]]:
        """``(kind, key)`` and node of each result of ``e2pass::body_backward``."""
        halves = self.compiled.halves
        nodes: Any = halves.backward.graph.output_node().args[0]
        return list(zip(halves.backward_outputs, nodes, strict=True))

    def rows(self, node: fx.Node) -> int:
        """Rows that a node's value has per sample; 0 if it does not grow with the batch."""
        size = node.meta["val"].shape[0] if node.meta["val"].dim() else 0
        return 0 if isinstance(size, int) else int(size.node.expr / self.compiled.joint.symbol)


DOMAIN = "e2pass.opaque"
"""Of the nodes that stand for the two operators until their branches are built."""
BODIES: dict[str, Body] = {}
"""What is being traced, by a name that the operators' last argument gives."""


@contextmanager
def traced(bodies: Mapping[str, Body]) -> Iterator[None]:
    """Let the operators find ``bodies`` by name."""
    BODIES.update(bodies)
    try:
        yield
    finally:
        BODIES.clear()


def _whole(body: Body, nodes: Iterable[tuple[Any, fx.Node]], mask: Tensor) -> list[Tensor]:
    """Stand-ins of the results for the whole batch."""
    made = []
    for _, node in nodes:
        value, rows = node.meta["val"], body.rows(node)
        shape = [mask.shape[0] * rows, *value.shape[1:]] if rows else list(value.shape)
        made.append(mask.new_empty(shape, dtype=value.dtype))
    return made


def _body(tensors: Sequence[Tensor], mask: Tensor, name: str) -> list[Tensor]:
    return _whole(BODIES[name], BODIES[name].outputs(), mask)


def _body_backward(tangents: Sequence[Tensor], mask: Tensor, name: str) -> list[Tensor]:
    return _whole(BODIES[name], BODIES[name].gradients(), mask)


_LIB = torch.library.Library("e2pass", "FRAGMENT")
for _schema, _fake in (
    ("body(Tensor[] tensors, Tensor mask, str name) -> Tensor[]", _body),
    ("body_backward(Tensor[] tangents, Tensor mask, str name) -> Tensor[]", _body_backward),
):
    _LIB.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"e2pass::{_schema.partition('(')[0]}", _fake, lib=_LIB)


class RunBody(torch.autograd.Function):
    """The two operators under autograd, as ``e2pass.runtime.region`` runs the two halves."""

    @staticmethod
    def forward(ctx: Any, body: Body, mask: Tensor, n: int, *tensors: Tensor) -> Any:
        """``tensors``: one per forward input of the region, then an alias of each weight with a predicted gradient."""
        ctx.body, ctx.mask = body, mask
        results = torch.ops.e2pass.body(list(tensors[:n]), mask, body.region.name)
        side = [r for r, ((kind, _), _) in zip(results, body.outputs(), strict=True) if kind != "output"]
        ctx.mark_non_differentiable(*side)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Gradients of the same."""
        body: Body = ctx.body
        halves = body.compiled.halves
        of_output = {key: grad for (key, _), grad in zip(body.outputs(), grads, strict=True)}
        tangents = [of_output["output", i] for i in halves.tangents]
        results = torch.ops.e2pass.body_backward(tangents, ctx.mask, body.region.name)
        return (None, None, None, *body.compiled.in_order(results))


class MergeWhole(torch.autograd.Function):
    """``merge_gathered`` for a body's results scattered into zeros: closed samples have no gradient of the mask."""

    @staticmethod
    def forward(ctx: Any, shortcut: Tensor, body: Tensor, mask: Tensor) -> Tensor:
        """Sum of the two."""
        ctx.save_for_backward(body)
        ctx.dtype = mask.dtype
        return shortcut + body

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """The mask's is the inner product of each sample's body, zero where closed, with the gradient."""
        (body,) = ctx.saved_tensors
        return grad, grad, (grad * body).flatten(1).sum(1).to(ctx.dtype)
