"""The operations that stand for the mini-batch: whether it comes at all, and each tensor of it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import Tensor

from e2pass.cost import OpSite, Phase, Technique, TensorSpec
from e2pass.dump import dtype_name
from e2pass.lowering.joint import Joint
from e2pass.program import Program
from e2pass.step.node import GraphNode

DATA = "data"
# No input of a model has these names: they are no identifiers.
SMD_NODE = f"{DATA}/smd-drop"
TARGET_NODE = f"{DATA}/loss-target"


def batch_nodes(program: Program, joints: Mapping[str, Joint], techniques: Collection[str]) -> Iterator[GraphNode]:
    """Yield SMD's decision, if it acts, the inputs of the model, and the target of the loss, if there is one."""
    above: tuple[str, ...] = ()
    if "smd" in techniques:
        decision = OpSite(SMD_NODE, "e2pass.smd.drop", (), (), region=DATA, phase=Phase.DATA, technique=Technique.SMD)
        yield GraphNode(decision, "smd.drop", made_by="drop-batches", coasts=True)
        above = (SMD_NODE,)
    values = {n.name: n.meta.get("val") for n in program.graphs["train"].graph.find_nodes(op="placeholder")}
    for name in program.plans["train"].inputs:
        yield _tensor(f"{DATA}/{name}", values[name], above, program.inputs.batch_size)
    loss = joints.get("loss")
    if loss is not None:
        target = loss.graph.find_nodes(op="placeholder")[loss.inputs.index(("input", 1))]
        yield _tensor(TARGET_NODE, target.meta["val"], above, program.inputs.batch_size)


def _tensor(name: str, value: Any, above: tuple[str, ...], batch: int) -> GraphNode:
    known = isinstance(value, Tensor)
    shape = tuple(_size(size, batch) for size in value.shape) if known else ()
    specs = (TensorSpec(shape, value.dtype.itemsize * 8),) if known else ()
    site = OpSite(name, "input", (), specs, region=DATA, phase=Phase.DATA)
    return GraphNode(site, operands=above, dtypes=(dtype_name(value.dtype),) if known else (), made_by="capture")


def _size(size: Any, batch: int) -> int:
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, batch)))
