"""``e2pass inspect``: what a transformation did to a model, and what it left alone and why."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from e2pass.cli.errors import one_line_errors
from e2pass.cli.options import Arguments, BoardName, Input, Keywords, Model, Preset, check_output, keyword_arguments

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from e2pass.step.diff import GraphDiff
    from e2pass.step.graph import TrainingGraph
    from e2pass.step.node import GraphNode
    from e2pass.transformed import Transformed

RegionName = Annotated[str | None, typer.Option(metavar="NAME", help="Only operations of this region")]
BlockName = Annotated[str | None, typer.Option(metavar="NAME", help="Only operations of this residual block")]
Tag = Annotated[
    str | None, typer.Option(help="Only operations with this tag, such as psg.msb, or below it, such as psg")
]
ModulePath = Annotated[str | None, typer.Option(help="Only operations of this module and those in it")]
SHOWN_CHANGES = 20
"""Lines of operations added, removed and replaced, each, that ``--diff`` prints without ``--all``."""

NO_GRADIENT = "a gradient that never arrives: the loss does not depend on this output"


def inspect(
    model: Model,
    arguments: Arguments = None,
    *,
    shapes: Input,
    kwargs: Keywords = None,
    config: Preset = "e2train",
    board: BoardName = "zedboard",
    graph: Annotated[bool, typer.Option("--graph", help="Print the training step, one line an operation")] = False,
    diff: Annotated[bool, typer.Option("--diff", help="Print what was added, replaced and removed")] = False,
    every: Annotated[
        bool, typer.Option("--all", help=f"With --diff: every change, not the first {SHOWN_CHANGES} of each kind")
    ] = False,
    node: Annotated[str | None, typer.Option(metavar="NAME", help="Print everything about one operation")] = None,
    region: RegionName = None,
    block: BlockName = None,
    tag: Tag = None,
    path: ModulePath = None,
    html: Annotated[Path | None, typer.Option(metavar="PATH", help="Write a page to look at in a browser")] = None,
) -> None:
    """Show what a transformation does to MODEL: blocks, weight gradients, and the reason for each that was left alone.

    --region, --block, --tag and --path narrow --graph, --diff and --html.
    """
    with one_line_errors():
        from e2pass.api import transform
        from e2pass.cli.output import console
        from e2pass.cli.target import build_model, parse_inputs
        from e2pass.config import resolve
        from e2pass.errors import InputError

        check_output(html)
        if every and not diff:
            raise InputError("--all is for --diff; give both")
        filters = {"region": region, "block": block, "tag": tag, "path": path}
        given = [f"--{name}" for name, value in filters.items() if value is not None]
        if given and not (graph or diff or html):
            raise InputError(f"{given[0]} narrows --graph, --diff and --html; give one of them too")
        inputs = parse_inputs(shapes)
        loader = [None, None] if resolve(config).smd is not None else None  # two batches, of which SMD may drop one
        built = build_model(model, keyword_arguments(arguments, kwargs))
        t = transform(built, inputs, loader, config=config, board=board)
        narrowed = t.graph.select(**filters) if any(filters.values()) else t.graph
        if graph:
            typer.echo(narrowed.to_text(), nl=False)
        if diff:
            print_diff(_changes(t, filters), console(), None if every else SHOWN_CHANGES)
        if node is not None:
            console().print(node_table(t.graph, node))
        if html is not None:
            narrowed.to_html(html)
            typer.echo(f"wrote {html}")
        if not (graph or diff or node or html):
            print_inspection(t, console())


def _changes(t: Transformed, filters: dict[str, str | None]) -> GraphDiff:
    """The changes to the part that fits the filters, in the step before or in the new one."""
    from e2pass.errors import InputError
    from e2pass.step.diff import GraphDiff

    whole = t.graph.diff()
    if not any(filters.values()):
        return whole
    part, before = t.graph.select(**filters), t.graph.original
    try:
        left = {n.name for n in before.select(**filters).nodes}
    except InputError:  # this part is new as a whole
        left = set()
    replaced = tuple(r for r in whole.replaced if r.after.name in part)
    return GraphDiff(
        added=tuple(n for n in whole.added if n.name in part),
        removed=tuple(n for n in whole.removed if n.name in left),
        replaced=replaced,
        kept=sum(n.name in before for n in part.nodes) - len(replaced),
    )


def print_inspection(t: Transformed, console: Console) -> None:
    """Print the blocks and weight gradients with their reasons, and everything else that was said."""
    console.print(block_table(t))
    gradients = list(_gradients(t))
    if gradients:
        console.print(_gradient_table(gradients))
    rest = [d for d in t.diagnostics if d.code not in ("E2P200", "E2P201", "E2P211", "E2P410", "E2P411")]
    console.print(f"what else was said: {len(rest)}")
    for diagnostic in rest:
        console.print(str(diagnostic), markup=False, highlight=False, soft_wrap=True)


def block_table(t: Transformed) -> Table:
    """The residual blocks, with the reason for each that has no gate."""
    from rich.table import Table

    table = Table(title=f"residual blocks: {len(t.blocks)}, gated: {sum(b.gated for b in t.blocks)}")
    for heading in ("block", "kind", "nodes", "gated", "reason"):
        table.add_column(heading, justify="right" if heading == "nodes" else "left", overflow="fold")
    for block in t.blocks:
        table.add_row(*_plain(block.name, block.kind, len(block.nodes), "yes" if block.gated else "no", block.reason))
    return table


def _gradients(t: Transformed) -> Iterator[tuple[str, bool, str]]:
    for diagnostic in t.diagnostics.with_code("E2P410", "E2P411"):
        predicted = diagnostic.code == "E2P410"
        yield diagnostic.node, predicted, "" if predicted else diagnostic.message.partition(": ")[2]


def _gradient_table(gradients: list[tuple[str, bool, str]]) -> Table:
    from rich.table import Table

    predicted = sum(found for _, found, _ in gradients)
    table = Table(title=f"gradients of parameters: {len(gradients)}, replaced by predicted signs: {predicted}")
    for heading in ("parameter", "predicted", "reason"):
        table.add_column(heading, overflow="fold")
    for name, found, reason in gradients:
        table.add_row(*_plain(name, "yes" if found else "no", reason))
    return table


def print_diff(changes: GraphDiff, console: Console, most: int | None = None) -> None:
    """Print the changes one by one, ``most`` of each kind, and last a summary: what is printed last stays in sight."""
    from rich.table import Table

    table = Table(title="changes by kind")
    for heading in ("change", "what", "operations"):
        table.add_column(heading, justify="right" if heading == "operations" else "left")
    for change, what, count in changes.summary():
        table.add_row(*_plain(change, what, count))
    console.print(changes.to_text(most), markup=False, highlight=False, soft_wrap=True, end="")
    console.print(table)
    console.print(changes.counts, highlight=False)
    if most is not None and max(map(len, (changes.added, changes.removed, changes.replaced))) > most:
        console.print("--all prints every change; --block, --region, --tag and --path choose a part", highlight=False)


def node_table(graph: TrainingGraph, name: str) -> Table:
    """Everything known about one operation.

    Raises:
        InputError: If there is no such operation; similar names are given.
    """
    from rich.table import Table

    node = graph[name]
    table = Table(title=node.name, show_header=False, title_justify="left")
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in [*_facts(graph, node), *_cost(graph, node)]:
        if value:
            table.add_row(*_plain(key, value))
    return table


def _facts(graph: TrainingGraph, node: GraphNode) -> Iterator[tuple[str, str]]:
    from e2pass.backends.graph.text import type_text

    site = node.site
    yield "operation", site.op
    yield "produces", type_text(node)
    yield "true width", ", ".join(f"{spec.bits} bits" for spec in node.outputs)
    yield "region", site.region
    yield "block", site.block or ""
    yield "module", site.layer
    yield "source line", node.line
    yield "made by", node.made_by
    yield "phase", str(site.phase)
    yield "technique", str(site.technique)
    yield "tag", node.tag
    yield "gate", "" if node.gate is None else f"{node.gate}: it runs only where this gate is open"
    yield "executions", f"{node.probability(graph.rates):.4g} per nominal step"
    yield "parameters", ", ".join(node.state)
    yield "reads", NO_GRADIENT if node.without_gradient else "\n".join(node.operands)
    yield "read by", "\n".join(graph.readers(node.name))


def _cost(graph: TrainingGraph, node: GraphNode) -> Iterator[tuple[str, str]]:
    from e2pass.report import si
    from e2pass.step.cost import FreeOp

    row = graph.costs.get(node.name)
    if row is None:
        why_not = graph.without_cost[node.name]
        yield "cost", f"{'free' if isinstance(why_not, FreeOp) else 'not priced'}: {why_not.reason}"
        return
    yield "energy (modelled)", si(row.total_j, "J")
    yield "", "\n".join(f"{level} {si(joules, 'J')}" for level, joules in row.energy_j.items())
    yield "time (modelled)", si(row.time_s, "s")
    yield "MACs", si(row.macs, "")
    yield "traffic", ", ".join(f"{level} {si(moved, 'B')}" for level, moved in row.traffic_bytes.items())
    yield "formula", row.formula


def _plain(*cells: object) -> list[str]:
    """Cells whose brackets are no markup: names come from the user's model."""
    from rich.markup import escape

    return [escape(str(cell)) for cell in cells]
