"""Finds the residual blocks of the captured graphs, by structure alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from e2pass.blocks import BlockSearch, ResidualBlock
from e2pass.diagnostics import Diagnostics
from e2pass.passes.base import Pass, PassResult
from e2pass.passes.residual import search
from e2pass.plan import Mode
from e2pass.program import Program


@dataclass(frozen=True)
class FindResidualBlocks(Pass):
    """Search every mode's graph and align the results.

    Attributes:
        include: Additions or module paths to gate although the search would not.
        exclude: Blocks to leave alone.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    name: ClassVar[str] = "find-residual-blocks"
    establishes: ClassVar[frozenset[str]] = frozenset({"blocks"})

    def run(self, program: Program) -> PassResult:
        """Write ``program.blocks``; an analysis, the graphs stay as they are."""
        diagnostics = Diagnostics()
        found = {mode: search(gm, include=self.include, exclude=self.exclude) for mode, gm in program.unique_graphs()}
        blocks = found["train"].blocks
        if "eval" in found:
            program.blocks = _align(blocks, found["eval"].blocks)
        else:
            program.blocks = {"train": blocks, "eval": blocks}
        _report(program, found["train"], diagnostics)
        return PassResult(program, bool(blocks), diagnostics)


def _align(train: list[ResidualBlock], evaluation: list[ResidualBlock]) -> dict[Mode, list[ResidualBlock]]:
    """Pair the blocks of the two graphs by name; a gate must have its block in both."""
    partners = {b.name: b for b in evaluation}
    pairs = []
    for block in train:
        partner = partners.get(block.name)
        if partner is None or not partner.gated:
            if block.gated:
                block.gated = False
                block.reason = "the evaluation graph does not have the same block"
            partner = partner or _absent(block)
        partner.gated, partner.reason = block.gated, block.reason
        pairs.append((block, partner))
    return {"train": [a for a, _ in pairs], "eval": [b for _, b in pairs]}


def _absent(block: ResidualBlock) -> ResidualBlock:
    """Stands in for a block in a graph that has none of its nodes."""
    return replace(block, nodes=(), fork="", shortcut="", arms=(), joins=(), side_inputs=())


def _report(program: Program, found: BlockSearch, diagnostics: Diagnostics) -> None:
    for block in program.blocks["train"]:
        if block.gated:
            diagnostics.info("E2P200", block.name, f"{block.kind} residual block of {len(block.nodes)} nodes")
        else:
            diagnostics.info("E2P201", block.name, f"residual block that is not gated: {block.reason}")
    for rejected in found.rejected:
        diagnostics.info("E2P202", rejected.node, f"addition that is no residual block: {rejected.reason}")
    if not any(b.gated for b in program.blocks["train"]) and program.config.slu is not None:
        diagnostics.warn(
            "E2P203",
            "",
            "no residual block that can be gated was found, so SLU has nothing to skip",
            "SMD and PSG work without residual blocks",
        )
