"""Rungs one and three: ``torch.fx`` symbolic tracing, of the whole model or with leaves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointFunction

from e2pass.capture.binding import Binding
from e2pass.capture.buffers import replaced, write_early
from e2pass.capture.dice import DRAWS, Outcomes
from e2pass.capture.functional import IN_PLACE_OPERATORS
from e2pass.capture.origin import current_line, explain, line_of_error
from e2pass.capture.output import OutputForm, flatten, is_nested
from e2pass.capture.rung import CONSTANT_PREFIX, Draft, RungError, same_graph
from e2pass.capture.state import model_kept
from e2pass.errors import CaptureError

# Residual blocks hide inside these; as opaque calls they could not be found.
_TRACED_INTO = (
    nn.Sequential,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoder,
    nn.TransformerDecoderLayer,
)


_TRACED = (fx.Proxy, torch.Tensor)


class Proxy(fx.Proxy):
    """Records ``x += y`` as the write that it is; ``fx.Proxy`` would make it ``x = x + y`` and lose it for aliases."""


def _recorder(function: Callable[..., Any]) -> Callable[[fx.Proxy, Any], Any]:
    def record(self: fx.Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


for _function in IN_PLACE_OPERATORS:
    setattr(Proxy, f"__{_function.__name__}__", _recorder(_function))


class _Tracer(fx.Tracer):
    """Traces a bound call; keeps the model free of attributes and remembers where tracing failed."""

    proxy_buffer_attributes = True  # a buffer read into a Python value would be frozen into the graph

    def __init__(
        self, binding: Binding, leaves: frozenset[str], constants: dict[str, torch.Tensor], outcomes: Outcomes
    ) -> None:
        super().__init__(autowrap_modules=(math,))
        self._outcomes = iter(outcomes)
        self._binding = binding
        self._leaves = leaves
        self._constants = constants
        self._grad = torch.is_grad_enabled()
        self.form: OutputForm | None = None
        self.failed_in: str | None = None
        self.leaves_met: set[str] = set()

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Make one placeholder per tensor of the call; everything else keeps its value."""
        proxies = [self.create_proxy("placeholder", name, (), {}) for name in self._binding.names]
        call = self._binding.call_with(proxies)

        def run(root: nn.Module) -> Any:
            before = dict(root.named_buffers(remove_duplicate=False))
            output = root(*call.args, **call.kwargs)
            for name, _, value in replaced(root, before):
                self._write(name, value)
            if is_nested(output, _TRACED):
                return output
            values, self.form = flatten(output, _TRACED)  # a graph holds no class of the user's
            return tuple(values)

        return run, [self.root]

    def _write(self, name: str, value: Any) -> None:
        """Record that buffer ``name`` was replaced by ``value``."""
        if not isinstance(value, (fx.Proxy, torch.Tensor)):
            raise RungError(f"the model sets its buffer {name} to {value!r}")
        detached = self.create_node("call_method", "detach", (self.create_arg(value),), {})
        self.create_node("call_method", "copy_", (self.create_node("get_attr", name, (), {}), detached), {})

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Make a proxy that knows in-place operators."""
        return Proxy(node, self)

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Create a node that knows its module and its source line."""
        if torch.is_grad_enabled() != self._grad:
            raise RungError("a graph of torch.fx cannot hold a region with gradients switched off")
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            raise RungError("a graph of torch.fx cannot hold an autocast region")
        node = super().create_node(kind, target, *args, **kwargs)
        node.meta["e2_path"] = self.scope.module_path
        node.meta["e2_stack"] = current_line()
        return node

    def create_arg(self, a: Any) -> Any:
        """Keep tensors that no module owns apart, instead of leaving them on the model."""
        if isinstance(a, torch.Tensor) and not isinstance(a, nn.Parameter):
            owned = self.tensor_attrs.get(a) or next((n for n, b in self.root.named_buffers() if b is a), None)
            if owned is None or ("." not in owned and owned not in self.root._buffers):
                owned = next((n for n, c in self._constants.items() if c is a), None)
                if owned is None:
                    owned = f"{CONSTANT_PREFIX}{len(self._constants)}"
                    self._constants[owned] = a.detach()
            return self.create_node("get_attr", owned, (), {})
        return super().create_arg(a)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Trace into the root, into the user's modules, and into those of torch that hold residual blocks."""
        if module_qualified_name == "":
            return False
        if module_qualified_name in self._leaves:
            self.leaves_met.add(module_qualified_name)
            return True
        if isinstance(m, _TRACED_INTO):
            return False
        return bool(type(m).forward.__module__.startswith(("torch.nn.", "torch.ao.nn.")))

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Decide by an idle throw, whose outcome is known; every other value is unknown."""
        if _is_drawn(obj.node):
            outcome = next(self._outcomes, None)
            if isinstance(outcome, bool):  # else Python read a number, of which the comparison is not known
                return outcome
        return super().to_bool(obj)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Trace a module call, noting the innermost one that fails."""
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed_in is None:
                self.failed_in = self.submodule_paths.get(m, "") if self.submodule_paths else ""
            raise


def _recordable(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """A plain function with a name of its own, which a graph needs of a call, that applies an autograd function."""

    def apply(*args: Any) -> Any:
        return function.apply(*args)

    apply.__name__ = apply.__qualname__ = function.__name__
    apply.__module__ = function.__module__
    return apply


@contextmanager
def _autograd_functions_recorded(tracer: fx.Tracer) -> Iterator[None]:
    """Record each call of a user's ``autograd.Function`` as one operation: traced into, it would lose its backward.

    What is checkpointed is traced into, for its backward is that of what it runs.
    """
    base: Any = torch.autograd.function._SingleLevelFunction
    recorded: dict[type, Callable[..., Any]] = {}

    def apply(cls: type[torch.autograd.Function], *args: Any) -> Any:
        if not any(isinstance(a, fx.Proxy) for a in args):
            return super(base, cls).apply(*args)
        if cls is CheckpointFunction:
            function, _, *inputs = args
            return function(*inputs)
        if "mark_dirty" in cls.forward.__code__.co_names:
            raise RungError(f"{cls.__name__} changes its input in place, which a graph does not show")
        target = recorded.setdefault(cls, _recordable(cls))
        return tracer.create_proxy("call_function", target, args, {})

    base.apply = classmethod(apply)
    try:
        yield
    finally:
        del base.apply


class _DrawsRecorded(TorchFunctionMode):
    """Makes ``torch.rand(4)`` an operation of the graph: called while tracing, it would be frozen into it."""

    def __init__(self, tracer: fx.Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Record ``func`` if it draws; where it has a traced argument, it is recorded anyway."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name not in DRAWS or any(isinstance(a, fx.Proxy) for a in pytree.tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        if name.endswith("_"):
            raise RungError("it draws random numbers into a tensor that is no part of the graph")
        return self._tracer.create_proxy("call_function", func, args, kwargs)


def _is_drawn(node: fx.Node) -> bool:
    """Whether a value comes of random numbers and constants alone."""
    if node.op == "call_function" and getattr(node.target, "__name__", "") in DRAWS and not node.all_input_nodes:
        return True
    return (
        node.op in ("call_function", "call_method")
        and bool(node.all_input_nodes)
        and all(_is_drawn(source) for source in node.all_input_nodes)
    )


def _trace(
    model: nn.Module,
    binding: Binding,
    training: bool,
    leaves: frozenset[str],
    constants: dict[str, torch.Tensor],
    outcomes: Outcomes,
) -> tuple[fx.Graph, _Tracer]:
    model.train(training)
    tracer = _Tracer(binding, leaves, constants, outcomes)
    try:
        with model_kept(model), _autograd_functions_recorded(tracer), _DrawsRecorded(tracer):
            graph = tracer.trace(model)
    except Exception as error:
        line = line_of_error(error)
        why = f"{error}, at {line}" if isinstance(error, RungError) else explain(error)
        raise RungError(why, tracer.failed_in or "") from error
    graph.eliminate_dead_code(_is_impure)
    write_early(graph)
    return graph, tracer


def _rebuild(form: OutputForm | None) -> Callable[[Any], Any]:
    return form.rebuild if form is not None else lambda output: output


def _is_impure(node: fx.Node) -> bool:
    """Keep everything that may write, draw random numbers or raise; drop unused reads, which only confuse analysis."""
    return node.op != "get_attr"


def draft(
    model: nn.Module, binding: Binding, outcomes: tuple[Outcomes, Outcomes], leaves: frozenset[str] = frozenset()
) -> Draft:
    """Trace ``model`` in both modes.

    Args:
        model: The model; attributes that its ``forward`` sets will hold proxies, so give a copy or restore it.
        binding: The call to trace.
        outcomes: What Python reads of random numbers in training and in evaluation.
        leaves: Paths of modules not to trace into.

    Raises:
        RungError: If tracing fails; ``failed_in`` names the innermost module.
    """
    constants: dict[str, torch.Tensor] = {}
    train, tracer = _trace(model, binding, True, leaves, constants, outcomes[0])
    evaluated, other = _trace(model, binding, False, leaves, constants, outcomes[1])
    if same_graph(train, evaluated) and tracer.form == other.form:
        evaluated = train
    rung = "symbolic_trace+leaves" if leaves else "symbolic_trace"
    rebuild = (_rebuild(tracer.form), _rebuild(other.form))
    return Draft(rung, (train, evaluated), constants, rebuild, leaves=tuple(sorted(tracer.leaves_met)))


def draft_with_leaves(model: nn.Module, binding: Binding, outcomes: tuple[Outcomes, Outcomes]) -> Draft:
    """Trace ``model`` with as few and as small opaque modules as it takes.

    The module in which tracing fails becomes a leaf; if then its parent fails, the parent does.

    Raises:
        CaptureError: If the model itself would have to become a leaf; the message names the offending line.
    """
    leaves: frozenset[str] = frozenset()
    while True:
        try:
            return draft(model, binding, outcomes, leaves)
        except RungError as failure:
            path = failure.failed_in
            while path in leaves:
                path = path.rpartition(".")[0]
            if not path:
                raise CaptureError(f"{type(model).__name__}.forward itself cannot be traced: {failure}") from failure
            leaves = frozenset(leaf for leaf in leaves if not leaf.startswith(path + ".")) | {path}
