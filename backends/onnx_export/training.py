"""Writing a whole training step as one ONNX graph, which plain onnxruntime executes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from torch import Tensor, fx

from e2pass.backends.onnx_export.aten import decompose, quiet, translate
from e2pass.backends.onnx_export.branches import expand_bodies
from e2pass.backends.onnx_export.files import (
    check_size,
    checkpoint_into,
    input_names,
    target_path,
    transformed_module,
    write_model,
)
from e2pass.backends.onnx_export.opaque import traced
from e2pass.backends.onnx_export.training_form import NEXT, TracedStep, TrainingForm
from e2pass.backends.onnx_export.update import check_damped, state_tensors, update_of
from e2pass.inputs import Inputs
from e2pass.runtime.module import E2Module

if TYPE_CHECKING:
    from e2pass.transformed import Transformed


def export_training(
    t_or_module: Transformed | E2Module,
    example_inputs: Any,
    target: Tensor | None,
    path: str | Path,
    *,
    loss: Callable[..., Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    checkpoint: Mapping[str, Any] | str | Path | None = None,
    gradients: bool = False,
) -> Path:
    """Write forward, loss, backward, gate cost and update as one ONNX graph of standard operators.

    Inputs are the batch (named as the arguments of ``forward``, with ``_in`` behind a name that is taken, and
    ``target``), ``lr.GROUP`` for each parameter group, and every tensor that the step changes, under its name in the
    state dict; optimizer states are ``NAME.STATE``. All but the batch have their present value as default. Outputs are
    ``loss``, and ``next.NAME`` for each changed tensor: feed it back as ``NAME``. The batch size is that of the example
    inputs. Blocks that no sample enters do not run.

    Args:
        t_or_module: What ``e2pass.transform`` returned, or its ``.model``; it is not changed.
        example_inputs: As for ``e2pass.transform``.
        target: An example of the loss's second argument; None where the model returns its loss itself.
        path: File to write; an existing one is replaced, and only by a complete file.
        loss: ``loss(output, target)``; default cross-entropy on the first output.
        optimizer: ``SGD``, ``Adam``, ``AdamW`` or ``e2pass.optim.SignSGD`` over the model's parameters, with its
            present state and learning rates; default SGD with learning rate 0.1 and momentum 0.9 over all of them.
        checkpoint: What ``t.state_dict()`` or ``t.model.state_dict()`` returned, or a file that ``torch.save`` wrote
            of it, to start from instead of the model's present state.
        gradients: Return each parameter's gradient too, as ``grad.NAME``.

    Returns:
        ``path``.

    Raises:
        InputError: If the arguments are of the wrong kind or do not fit the model.
        ConfigError: If the optimizer's update has no exported form.
        ExportError: If the step has no ONNX form; the message names operator, place and what to do.
    """
    module = transformed_module(t_or_module)
    path = target_path(path)
    optimizer = optimizer or default_optimizer(module)
    update = update_of(optimizer, module)
    check_damped(optimizer, module)
    form = TrainingForm(checkpoint_into(module, checkpoint), loss, update, gradients)
    inputs = Inputs.of(example_inputs)
    tensors = tuple(v.detach() for v in form.twin._executable.capture.bind(inputs.args, inputs.kwargs))
    form.prepare(tensors)
    with quiet(), traced(form.bodies):
        model = _model(form, form.trace(tensors, target))
        write_model(model, path)
    return path


def default_optimizer(module: E2Module) -> torch.optim.Optimizer:
    """SGD with learning rate 0.1 and momentum 0.9, the default of the price too."""
    return torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


def training_state(
    t_or_module: Transformed | E2Module, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, Tensor]:
    """Present value of every tensor that a training step may change, under the names of the exported inputs."""
    module = transformed_module(t_or_module)
    return state_tensors(module, update_of(optimizer or default_optimizer(module), module))


def _model(form: TrainingForm, step: TracedStep) -> ir.Model:
    arguments = [node.meta["val"] for node in step.graph.graph.find_nodes(op="placeholder")]
    graph = decompose(step.graph, arguments, form.place_of)
    names = _keep_changed(graph, step)
    model = ir.Model(ir.Graph([], [], nodes=[], name="training_step"), ir_version=10)
    translate(graph, model, model.graph, form.place_of)
    expand_bodies(model, form.place_of)
    constants = list(model.graph.initializers.values())
    for constant, name in zip(constants, input_names([str(c.name) for c in constants], step.inputs), strict=True):
        constant.name = name
    for name, value in zip(names, model.graph.outputs, strict=True):
        value.name = NEXT + name if name in step.state else name
    inputs = dict(zip(step.inputs, model.graph.inputs, strict=True))
    model.graph.inputs.clear()
    for name, value in inputs.items():
        value.name = name
        if name not in step.state:
            model.graph.inputs.append(value)
        elif value.uses():
            value.const_value = ir.tensor(step.state[name].detach().numpy(), name=name)
            model.graph.initializers[name] = value
            if name in names or name.startswith("lr."):
                model.graph.inputs.append(value)
    check_size(model)
    return model


def _keep_changed(graph: fx.GraphModule, step: TracedStep) -> list[str]:
    """Drop the outputs that are inputs, handed on: tensors that the step does not change."""
    output = graph.graph.output_node()
    values: Any = output.args[0]
    kept = [(name, v) for name, v in zip(step.outputs, values, strict=True) if v.op != "placeholder"]
    output.args = ([v for _, v in kept],)
    graph.graph.eliminate_dead_code()
    return [name for name, _ in kept]
