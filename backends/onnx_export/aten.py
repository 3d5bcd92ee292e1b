"""ATen graphs to ONNX nodes, by the translations that torch's exporter has.

This is the one module that touches the exporter's internals: its public entry takes whole programs only, and the
training step is made of graphs that exist already.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx

from e2pass.backends.onnx_export import decompositions
from e2pass.backends.onnx_export.files import first_line
from e2pass.backends.onnx_export.functions import OPSET
from e2pass.errors import ExportError

try:
    from torch.onnx._internal.exporter import _core, _decomp, _fx_passes, _registration

    _translate = _core._translate_fx_graph
except (ImportError, AttributeError):
    raise ImportError(
        f"torch {torch.__version__} has another ONNX exporter than the export of training steps was written for; "
        "install torch>=2.13,<2.14"
    ) from None

PlaceOf = Callable[[str], str]
"""Where an operator comes from, in words, for an error; ``""`` if unknown."""


@functools.cache
def registry() -> Any:
    """The exporter's translations, with those of the project's own operators and of what it translates wrongly."""
    from e2pass.backends.onnx_export import translation  # which records nodes by way of this module

    made = _registration.ONNXRegistry.from_torchlib(opset_version=OPSET)
    for target, function in translation.TABLE.items():
        made.register_op(target, function)
    return made


@functools.cache
def _decomposition_table() -> dict[Any, Callable[..., Any]]:
    known = set(_decomp.get_onnx_implemented_overloads(registry()))
    return {**_decomp.create_onnx_friendly_decomposition_table(known), **decompositions.TABLE}


def decomposed(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """An exported program in operators that have a translation."""
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        made: torch.export.ExportedProgram = program.run_decompositions(_decomposition_table())
    return made


def decompose(graph: fx.GraphModule, arguments: Sequence[Any], place_of: PlaceOf) -> fx.GraphModule:
    """Rewrite a graph without mutations, in operators that have a translation.

    Args:
        graph: Any graph of ATen and own operators; it is changed.
        arguments: Fake tensors and sizes, one per placeholder.
        place_of: For errors.

    Raises:
        ExportError: Naming the operator that cannot be rewritten.
    """
    _drop_identities(graph.graph, (torch.ops.aten.detach.default,))
    mode = next(a.fake_mode for a in arguments if isinstance(a, FakeTensor))  # new tensors belong to it too
    constants = _lift_constants(graph)
    graph.recompile()
    functional = torch.func.functionalize(graph, remove="mutations")
    tracer = make_fx(functional, _decomposition_table(), _allow_non_fake_inputs=True)
    try:
        with mode, enable_python_dispatcher(), torch.no_grad():
            made = tracer(*arguments, *(mode.from_tensor(c) for c in constants))
    except NotImplementedError as error:
        raise ExportError(f"{error} has no ONNX form in a training step; replace it in the model") from error
    except Exception as error:
        raise ExportError(
            f"the graph cannot be rewritten in operators that ONNX has: {first_line(error)}; please report it"
        ) from error
    made.graph.eliminate_dead_code()
    _fx_passes.insert_type_promotion_nodes(made)
    # From here on nothing has strides, and in a graph without mutations a copy is an identity.
    _drop_identities(made.graph, (torch.ops.aten.clone.default, torch.ops.aten.lift_fresh_copy.default))
    made.graph.eliminate_dead_code()
    made = _fx_passes.remove_assertion_nodes(made)
    _restore_constants(made, constants)
    return made


def _lift_constants(module: fx.GraphModule) -> list[torch.Tensor]:
    """Make each constant a further input, so that the trace keeps apart what it is and what it looks like."""
    constants = []
    last = module.graph.find_nodes(op="placeholder")[-1]
    for node in module.graph.find_nodes(op="get_attr"):
        constants.append(getattr(module, node.target))
        with module.graph.inserting_after(last):
            last = module.graph.placeholder(f"constant_{len(constants)}")
        node.replace_all_uses_with(last)
        module.graph.erase_node(node)
    return constants


def _restore_constants(module: fx.GraphModule, constants: Sequence[torch.Tensor]) -> None:
    placeholders = module.graph.find_nodes(op="placeholder")
    for i, (node, value) in enumerate(zip(placeholders[len(placeholders) - len(constants) :], constants, strict=True)):
        name = f"constant_{i}"
        module.register_buffer(name, value)
        with module.graph.inserting_after(placeholders[-1]):
            constant = module.graph.get_attr(name)
        constant.meta["val"] = value
        node.replace_all_uses_with(constant)
        module.graph.erase_node(node)


def _drop_identities(graph: fx.Graph, targets: Collection[Any]) -> None:
    for node in list(graph.nodes):
        if node.target in targets:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def translate(graph: fx.GraphModule, model: ir.Model, into: ir.Graph | ir.Function, place_of: PlaceOf) -> None:
    """Append the ONNX nodes of a decomposed graph to ``into``, with its inputs and outputs.

    Raises:
        ExportError: Naming the operator that has no translation, and where it is.
    """
    try:
        _translate(graph.graph, model, graph_like=into, owned_graphs={}, lower="at_conversion", registry=registry())
    except Exception as error:
        raise ExportError(untranslated(error, place_of)) from error
    seen = set(into.inputs)
    for i, value in enumerate(into.outputs):  # an output that is an input, or given twice, is a copy of its own
        if value in seen:
            copy = ir.node("Identity", [value])
            copy.outputs[0].type, copy.outputs[0].shape = value.type, value.shape
            into.append(copy)
            into.outputs[i] = copy.outputs[0]
        seen.add(into.outputs[i])


def record(node: ir.Node) -> Sequence[ir.Value]:
    """Add a node from within a translation; returns its outputs."""
    tracer: Any = _core.current_tracer
    tracer.nodes.append(node)
    return node.outputs


def untranslated(error: BaseException, place_of: PlaceOf) -> str:
    """Name the operator that has no translation and the place it came from."""
    chain: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        chain.append(str(cause))
        cause = cause.__cause__
    failed = re.search(r"%(\w+) : .*?\[target=torch\.ops\.([\w.]+)\]", "\n".join(chain))
    if failed is None:
        return f"torch.onnx cannot translate the model: {first_line(error)}; replace the operator it names"
    place = place_of(failed[2]) or f"the model (node {failed[1]})"
    return (
        f"operator {failed[2]} in {place} has no ONNX form; replace it by operators that have one, or keep that part "
        "out of the exported model"
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporter: what matters is raised."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
