"""``e2pass export``: a transformed model, or its training step, in a format of another tool."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from e2pass.cli.errors import one_line_errors
from e2pass.cli.options import Arguments, BoardName, Input, Keywords, Model, check_output, keyword_arguments, one_of

if TYPE_CHECKING:
    import torch

    from e2pass.transformed import Transformed

FORMATS = ("onnx-inference", "onnx-train", "onnx-annotated", "zigzag", "scalesim", "model-explorer", "dot", "html")
OPTIMIZERS = ("sgd", "sgd_momentum", "adam", "adamw")


def export(
    model: Model,
    arguments: Arguments = None,
    *,
    shapes: Input,
    to: Annotated[str, typer.Option("--to", help=" | ".join(FORMATS))],
    out: Annotated[Path, typer.Option("--output", "-o", metavar="PATH", help="File to write")],
    kwargs: Keywords = None,
    config: Annotated[str, typer.Option(help="Preset to transform with")] = "e2train",
    board: BoardName = "zedboard",
    checkpoint: Annotated[
        Path | None, typer.Option(help="State dict of the transformed model, written by torch.save (ONNX only)")
    ] = None,
    masked: Annotated[bool, typer.Option("--masked", help="onnx-inference without control flow")] = False,
    target: Annotated[
        str | None, typer.Option(metavar="DIMS[:DTYPE]", help="onnx-train: the labels; default one class a sample")
    ] = None,
    optimizer: Annotated[str, typer.Option(help="onnx-train: " + " | ".join(OPTIMIZERS))] = "sgd_momentum",
    lr: Annotated[float, typer.Option(help="onnx-train: learning rate, an input of the file")] = 0.1,
) -> None:
    """Transform MODEL and write it, or its training step, for another tool."""
    with one_line_errors():
        from e2pass.api import transform
        from e2pass.cli.target import build_model, parse_inputs
        from e2pass.config import resolve

        one_of("--to", to, FORMATS)
        one_of("--optimizer", optimizer, OPTIMIZERS)
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

            labels = _labels(inputs, target)
            export_training(t, inputs, labels, out, optimizer=_optimizer(t, optimizer, lr), checkpoint=checkpoint)
        else:
            _write_graph(t, to, out)
        typer.echo(f"wrote {out}")


def _labels(inputs: Any, target: str | None) -> torch.Tensor:
    import torch

    from e2pass.cli.target import parse_inputs
    from e2pass.errors import InputError
    from e2pass.inputs import Inputs

    if target is None:
        return torch.zeros(Inputs.of(inputs).batch_size, dtype=torch.int64)
    labels = parse_inputs([target])
    if not isinstance(labels, torch.Tensor):
        raise InputError(f"--target {target!r} has a name; give DIMS[:DTYPE] alone")
    return labels


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
