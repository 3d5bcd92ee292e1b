"""The verifier that runs between passes: invariants of every program, whatever passes it went through."""

from __future__ import annotations

from torch import fx

from e2pass.dump import dump
from e2pass.errors import VerifyError
from e2pass.plan import Decide, Plan, RunRegion
from e2pass.program import Program


def verify(program: Program) -> None:
    """Check the program's graphs, blocks, plans and joint graphs.

    Raises:
        VerifyError: With the broken invariant; the dump of the graph is attached as a note.
    """
    for mode, gm in program.unique_graphs():
        _lint(gm.graph, f"{mode} graph")
        _values_known(gm.graph, f"{mode} graph")
        names = {n.name for n in gm.graph.nodes}
        for block in program.blocks.get(mode, []):
            own = (*block.nodes, block.fork, block.shortcut, *block.joins[-1:])
            lost = [n for n in own if n and n not in names]  # a block of one mode only has no nodes in the other
            if lost and not program.plans:
                raise VerifyError(f"block {block.name} names node {lost[0]}, which the {mode} graph does not have")
    for mode, plan in program.plans.items():
        _definitions_precede_uses(plan, mode)
    for name, joints in program.lowered.items():
        for joint in joints:
            _lint(joint.graph, f"joint graph of {name}")
            if len(joint.outputs) != len(joint.output_nodes()):
                raise VerifyError(f"joint graph of {name} describes {len(joint.outputs)} outputs, not all of them")


def _lint(graph: fx.Graph, where: str) -> None:
    try:
        graph.lint()
    except Exception as error:
        failure = VerifyError(f"the {where} is malformed: {str(error).splitlines()[0]}")
        failure.add_note(dump(graph))
        raise failure from error


def _values_known(graph: fx.Graph, where: str) -> None:
    for node in graph.nodes:
        if node.op not in ("output", "get_attr") and "val" not in node.meta:
            raise VerifyError(f"node {node.name} of the {where} has no value in its meta data")


def _definitions_precede_uses(plan: Plan, mode: str) -> None:
    known = set(plan.inputs)
    for step in plan.steps:
        if isinstance(step, RunRegion):
            uses, makes = step.region.inputs, step.region.outputs
        elif isinstance(step, Decide):
            uses, makes = (step.fork, *([step.previous] if step.previous else [])), (step.out,)
        else:
            uses, makes = (step.gate, step.shortcut, *step.body.inputs), (step.out,)
        missing = [u for u in uses if u not in known]
        if missing:
            raise VerifyError(f"the {mode} plan uses {missing[0]} before it is computed")
        known |= set(makes)
        known -= set(step.release)
