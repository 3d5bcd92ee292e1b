"""Rung two: ``torch.export`` with a dynamic batch dimension, once in training and once in evaluation mode."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import sympy
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from e2pass.capture.binding import Binding
from e2pass.capture.buffers import replaced, write_early
from e2pass.capture.dice import Outcomes, Settled
from e2pass.capture.origin import explain, line_of_trace
from e2pass.capture.output import OutputForm, flatten
from e2pass.capture.rung import CONSTANT_PREFIX, Draft, RungError, same_graph
from e2pass.capture.state import quiet

_MODEL = "model"
_NO_EFFECT = ("_assert", "sym_constrain_range", "_check", "assume")


class _Cell:
    """Holds the form of an output outside of the module: exporting puts a module's attributes back."""

    form: OutputForm


class _Flat(nn.Module):
    """The model as a function of its placeholders that returns a flat tuple."""

    def __init__(self, model: nn.Module, binding: Binding, cell: _Cell, outcomes: Outcomes) -> None:
        super().__init__()
        self.model = model
        self._binding = binding
        self.cell = cell
        self._outcomes = outcomes

    def forward(self, *tensors: torch.Tensor) -> tuple[Any, ...]:
        """Call the model; remember the form of what it returned."""
        call = self._binding.call_with(tensors)
        before = dict(self.model.named_buffers(remove_duplicate=False))
        with Settled(self._outcomes) if self._outcomes else nullcontext():
            values, self.cell.form = flatten(self.model(*call.args, **call.kwargs))
        # torch.export loses `self.buffer = value` in nested modules; as a write into the buffer it is kept
        for name, buffer, value in replaced(self.model, before):
            if not isinstance(value, torch.Tensor):
                raise RungError(f"the model sets its buffer {name} to {value!r}")
            buffer.copy_(value.detach())
        return tuple(values)


def draft(
    model: nn.Module,
    binding: Binding,
    tensors: Sequence[torch.Tensor],
    batched: Sequence[bool],
    outcomes: tuple[Outcomes, Outcomes],
) -> Draft:
    """Export ``model`` in both modes.

    Args:
        model: The model; give a copy, exporting runs it.
        binding: The call to export.
        tensors: One example per placeholder, with a batch of at least two.
        batched: Which of them have the batch in dimension 0.
        outcomes: What Python reads of random numbers in training and in evaluation.

    Raises:
        RungError: If the model cannot be exported, or holds something that a flat graph cannot.
    """
    constants: dict[str, torch.Tensor] = {}
    graphs: list[fx.Graph] = []
    forms: list[OutputForm] = []
    sizes: list[tuple[int | None, ...]] = []
    guards: list[Callable[[int], bool]] = []
    for training, read in zip((True, False), outcomes, strict=True):
        model.train(training)
        program, form = _export(_Flat(model, binding, _Cell(), read), tensors, batched)
        graphs.append(_Flattener(program, model, binding, constants).run())
        forms.append(form)
        sizes = _merge(sizes, _sizes(program))
        guards += _guards(program)
    train, evaluated = graphs
    if same_graph(train, evaluated) and forms[0] == forms[1]:
        evaluated = train
    return Draft(
        "export",
        (train, evaluated),
        constants,
        rebuild=(forms[0].rebuild, forms[1].rebuild),
        sizes=tuple(sizes),
        allows_batch=lambda batch: all(guard(batch) for guard in guards),
    )


def _export(
    flat: _Flat, tensors: Sequence[torch.Tensor], batched: Sequence[bool]
) -> tuple[ExportedProgram, OutputForm]:
    flat.training = flat.model.training
    shapes = tuple({0: Dim.AUTO} if of_batch else None for of_batch in batched)
    try:
        with quiet():
            program = torch.export.export(flat, tuple(tensors), dynamic_shapes=(shapes,), strict=False)
    except Exception as error:
        raise RungError(explain(error)) from error
    return program, flat.cell.form


def _sizes(program: ExportedProgram) -> list[tuple[int | None, ...]]:
    """Sizes of the user's inputs that are baked into the program."""
    return [
        tuple(size if isinstance(size, int) else None for size in value.shape) for value in _example_values(program)
    ]


def _guards(program: ExportedProgram) -> list[Callable[[int], bool]]:
    """What the exporter assumed about the batch size.

    Every free dimension is a batch, so all symbols stand for the same number.
    """

    def holds(expression: sympy.Basic) -> Callable[[int], bool]:
        symbols = list(expression.free_symbols)
        return lambda batch: expression.xreplace({s: sympy.Integer(batch) for s in symbols}) != sympy.false

    def within(low: int, high: int) -> Callable[[int], bool]:
        return lambda batch: low <= batch <= high

    modes = [value.fake_mode for value in _example_values(program) if isinstance(value, FakeTensor)]
    environment = modes[0].shape_env if modes else None
    guards = [holds(guard.expr) for guard in environment.guards] if environment is not None else []
    for limits in program.range_constraints.values():
        low = 1 if limits.lower <= 2 else int(limits.lower)  # two is where symbols begin; one is proved separately
        guards.append(within(low, sys.maxsize if limits.upper > sys.maxsize else int(limits.upper)))
    return guards


def _example_values(program: ExportedProgram) -> list[Any]:
    names = set(program.graph_signature.user_inputs)
    return [node.meta["val"] for node in program.graph.find_nodes(op="placeholder") if node.name in names]


def _merge(one: list[tuple[int | None, ...]], other: list[tuple[int | None, ...]]) -> list[tuple[int | None, ...]]:
    """Keep every size that either mode fixes."""
    if not one:
        return other
    return [
        tuple(b if a is None else a for a, b in zip(first, second, strict=True))
        for first, second in zip(one, other, strict=True)
    ]


class _Flattener:
    """Turns an exported program into a flat graph over the model's own attributes."""

    def __init__(
        self, program: ExportedProgram, model: nn.Module, binding: Binding, constants: dict[str, torch.Tensor]
    ) -> None:
        self._program = program
        self._names = iter(binding.names)
        self._constants = constants
        self._graph = fx.Graph()
        self._env: dict[fx.Node, Any] = {}
        self._attributes: dict[fx.Node, str] = {}
        self._fetched: dict[str, fx.Node] = {}
        self._inlined: set[Any] = set()
        self._canonical = _canonical_names(model)

    def run(self) -> fx.Graph:
        """Copy node by node; parameters become ``get_attr`` nodes where they are first used."""
        self._placeholders()
        for node in self._program.graph.nodes:
            if node.op == "output":
                self._output(node)
            elif node.op != "placeholder":
                self._copy(node)
        self._graph.eliminate_dead_code()
        write_early(self._graph)
        self._graph.lint()
        return self._graph

    def _placeholders(self) -> None:
        specs = self._program.graph_signature.input_specs
        for node, spec in zip(self._program.graph.find_nodes(op="placeholder"), specs, strict=True):
            if spec.kind is InputKind.USER_INPUT:
                fresh = self._graph.placeholder(next(self._names))
                fresh.meta = {"e2_path": "", "e2_stack": ""}
                self._env[node] = fresh
            elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                name = str(spec.target).removeprefix(f"{_MODEL}.")
                self._attributes[node] = self._canonical.get(name, name)
            elif spec.kind is InputKind.CONSTANT_TENSOR:
                self._attributes[node] = self._constant(self._program.constants[str(spec.target)])
            else:
                raise RungError(f"the model holds a constant that is no tensor ({spec.target})")

    def _constant(self, value: torch.Tensor) -> str:
        for name, known in self._constants.items():
            if known is value or (known.shape == value.shape and known.dtype == value.dtype and known.equal(value)):
                return name
        name = f"{CONSTANT_PREFIX}{len(self._constants)}"
        self._constants[name] = value.detach()
        return name

    def _value(self, node: fx.Node, user: fx.Node) -> Any:
        if node not in self._attributes:
            return self._env[node]
        target = self._attributes[node]
        if target not in self._fetched:
            fetched = self._graph.create_node("get_attr", target)
            fetched.meta.update(_origin(user))
            self._fetched[target] = fetched
        return self._fetched[target]

    def _copy(self, node: fx.Node) -> None:
        name = _op_name(node)
        if node.op == "get_attr":  # body of a higher-order op; copied where it is called
            return
        if name.startswith(_NO_EFFECT):
            return
        if name == "wrap_with_set_grad_enabled":
            self._inline(node)
            return
        if node.op != "call_function" or isinstance(node.target, torch._ops.HigherOrderOperator):
            raise RungError(f"the exported graph holds {name or node.op}, which cannot be flattened")
        if node.target is operator.getitem and node.args[0] in self._inlined:
            source: Any = node.args[0]
            self._env[node] = self._env[source][node.args[1]]
            return
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self._value(n, node))
        fresh = self._graph.create_node(node.op, node.target, args, kwargs, name=node.name)
        fresh.meta.update({k: node.meta[k] for k in ("nn_module_stack", "stack_trace") if k in node.meta})
        fresh.meta.update(_origin(node))
        self._env[node] = fresh

    def _inline(self, node: fx.Node) -> None:
        """Copy a region in which gradients are off: the same operations, with their results detached."""
        enabled, body_ref, *inputs = node.args
        if enabled or not isinstance(body_ref, fx.Node):
            raise RungError("the model switches gradients on again inside a region without them")
        body = self._program.graph_module.get_submodule(str(body_ref.target))
        if not isinstance(body, fx.GraphModule):
            raise RungError("the body of a region without gradients is no graph")
        for inner, outer in zip(body.graph.find_nodes(op="placeholder"), inputs, strict=True):
            if not isinstance(outer, fx.Node):
                self._env[inner] = outer
            elif outer in self._attributes:
                self._attributes[inner] = self._attributes[outer]
            else:
                self._env[inner] = self._env[outer]
        for inner in body.graph.nodes:
            if inner.op == "output":
                self._inlined.add(node)
                self._env[node] = [self._detach(value, inner) for value in inner.args[0]]
            elif inner.op != "placeholder":
                self._copy(inner)

    def _detach(self, value: Any, user: fx.Node) -> Any:
        if not isinstance(value, fx.Node):
            return value
        mapped = self._value(value, user)
        example = value.meta.get("val")
        if not isinstance(example, torch.Tensor) or not (example.is_floating_point() or example.is_complex()):
            return mapped
        detached = self._graph.call_function(torch.ops.aten.detach.default, (mapped,))
        detached.meta.update(_origin(value))
        return detached

    def _output(self, node: fx.Node) -> None:
        kinds = [spec.kind for spec in self._program.graph_signature.output_specs]
        if any(kind is not OutputKind.USER_OUTPUT for kind in kinds):
            raise RungError("the exported graph returns more than the model does")
        result = fx.map_arg(node.args[0], lambda n: self._value(n, node))
        self._graph.output(result).meta.update({"e2_path": "", "e2_stack": ""})


def _op_name(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._opname
    return str(getattr(target, "__name__", ""))


def _origin(node: fx.Node) -> dict[str, str]:
    entered = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    inside = [path for path in entered if path == _MODEL or path.startswith(f"{_MODEL}.")]  # torch adds others
    path = inside[-1].removeprefix(_MODEL).removeprefix(".") if inside else ""
    return {"e2_path": path, "e2_stack": line_of_trace(node.meta.get("stack_trace"))}


def _canonical_names(model: nn.Module) -> dict[str, str]:
    """From every name of a parameter or buffer to the first name of the same tensor."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    for collect in (model.named_parameters, model.named_buffers):
        for name, tensor in collect(remove_duplicate=False):
            names[name] = first.setdefault(id(tensor), name)
    return names
