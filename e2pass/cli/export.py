"""``e2pass export``: a transformed model, or its training step, in a format of another tool."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from e2pass.cli.errors import one_line_errors
from e2pass.cli.options import (
    Arguments,
    BoardName,
    Input,
    Keywords,
    Model,
    Preset,
    check_output,
    keyword_arguments,
    one_of,
)

if TYPE_CHECKING:
    import torch

    from e2pass.transformed import Transformed

FORMATS = ("onnx-inference", "onnx-train", "onnx-annotated", "zigzag", "scalesim", "model-explorer", "dot", "html")
OPTIMIZERS = ("sgd", "sgd_momentum", "adam", "adamw")
MEANT_FOR = {
    "--checkpoint": ("onnx-inference", "onnx-train"),
    "--masked": ("onnx-inference",),
    "--target": ("onnx-train",),
    "--optimizer": ("onnx-train",),
    "--lr": ("onnx-train",),
}
"""Options that only some formats have."""
NEXT = {
    "onnx-annotated": "Netron shows cost and tag of each operation; the file is to be looked at, it does not run",
    "zigzag": "it is a workload for ZigZag, each layer at its true widths",
    "scalesim": "SCALE-Sim simulates it: python -m scalesim.scale -t {out} -l LAYOUT -c CONFIG -i gemm",
    "model-explorer": "it colours the nodes of the file that --to onnx-annotated writes for the same model",
    "dot": "dot -Tsvg {out} -o step.svg draws it; --to html is the page for large models",
    "html": "open it in a browser",
}
"""What to do with the file."""


def export(
    model: Model,
    arguments: Arguments = None,
    *,
    shapes: Input,
    to: Annotated[str, typer.Option("--to", help=" | ".join(FORMATS))],
    out: Annotated[Path, typer.Option("--output", "-o", metavar="PATH", help="File to write")],
    kwargs: Keywords = None,
    config: Preset = "e2train",
    board: BoardName = "zedboard",
    checkpoint: Annotated[
        Path | None, typer.Option(help="State dict of the transformed model, written by torch.save (ONNX only)")
    ] = None,
    masked: Annotated[bool, typer.Option("--masked", help="onnx-inference without control flow")] = False,
    target: Annotated[
        str | None,
        typer.Option(metavar="DIMS[:DTYPE]", help="onnx-train: labels; default those of cross-entropy"),
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option(help=f"onnx-train: {' | '.join(OPTIMIZERS)}; default sgd_momentum")
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="onnx-train: learning rate, an input of the file; default 0.1")
    ] = None,
) -> None:
    """Transform MODEL and write it, or its training step, for another tool."""
    with one_line_errors():
        from e2pass.api import transform
        from e2pass.cli.target import build_model, parse_inputs
        from e2pass.config import resolve

        one_of("--to", to, FORMATS)
        given = {"--checkpoint": checkpoint, "--masked": masked or None, "--target": target}
        _refuse_foreign(to, given | {"--optimizer": optimizer, "--lr": lr})
        one_of("--optimizer", optimizer or "sgd_momentum", OPTIMIZERS)
        check_output(out)
        inputs = parse_inputs(shapes)
        loader = [None, None] if resolve(config).smd is not None else None  # two batches, of which SMD may drop one
        t = transform(
            build_model(model, keyword_arguments(arguments, kwargs)), inputs, loader, config=config, board=board
        )
        if to == "onnx-inference":
            from e2pass.backends.onnx_export import export_inference

            export_inference(t, inputs, out, masked=masked, checkpoint=checkpoint)
        elif to == "onnx-train":
            from e2pass.backends.onnx_export import export_training

            made = _optimizer(t, optimizer or "sgd_momentum", 0.1 if lr is None else lr)
            export_training(t, inputs, _target(t, target), out, optimizer=made, checkpoint=checkpoint)
        else:
            _write_graph(t, to, out)
        typer.echo(f"wrote {out}")
        if to in MEANT_FOR["--checkpoint"] and checkpoint is None:
            typer.echo(f"its weights are those that {model} starts with; --checkpoint FILE gives it trained ones")
        if to in NEXT:
            typer.echo(NEXT[to].format(out=out))


def _refuse_foreign(to: str, given: dict[str, Any]) -> None:
    from e2pass.errors import InputError

    for option, value in given.items():
        if value is not None and to not in MEANT_FOR[option]:
            raise InputError(f"{option} does nothing for --to {to}; it is for {' and '.join(MEANT_FOR[option])}")


def _target(t: Transformed, given: str | None) -> torch.Tensor | None:
    """What the loss gets beside the output: as given, or the labels of cross-entropy; None if the output is a loss."""
    import torch

    from e2pass.cli.target import parse_inputs
    from e2pass.errors import InputError

    if given is None:
        labels = "data/loss-target"
        return torch.zeros(t.graph[labels].outputs[0].shape, dtype=torch.int64) if labels in t.graph else None
    parsed = parse_inputs([given])
    if not isinstance(parsed, torch.Tensor):
        raise InputError(f"--target {given!r} has a name; give DIMS[:DTYPE] alone")
    return parsed


def _optimizer(t: Transformed, name: str, lr: float) -> torch.optim.Optimizer:
    import torch

    groups = t.param_groups(lr)
    makers: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "sgd": lambda: torch.optim.SGD(groups, lr=lr),
        "sgd_momentum": lambda: torch.optim.SGD(groups, lr=lr, momentum=0.9),
        "adam": lambda: torch.optim.Adam(groups, lr=lr),
        "adamw": lambda: torch.optim.AdamW(groups, lr=lr),
    }
    return makers[name]()


def _write_graph(t: Transformed, to: str, out: Path) -> None:
    from e2pass.backends import interop
    from e2pass.backends.interop.files import write_text

    if to == "html":
        t.graph.to_html(out)
    elif to == "dot":
        write_text(t.graph.to_dot(), out)
    else:
        writers: dict[str, Callable[..., Path]] = {
            "onnx-annotated": interop.write_annotated,
            "zigzag": interop.write_zigzag,
            "scalesim": interop.write_scalesim,
            "model-explorer": interop.write_model_explorer,
        }
        writers[to](t.graph, out)
