"""What every node produces: fake tensors with a symbolic batch size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils import _pytree as pytree

from e2pass.capture.origin import first_sentence
from e2pass.capture.rung import RungError
from e2pass.inputs import Inputs


class Seen:
    """What a module that cannot run on fake tensors returned for two real batch sizes."""

    def __init__(self, sizes: tuple[int, int], outputs: tuple[Any, Any]) -> None:
        """Keep the outputs of two runs.

        Args:
            sizes: The two batch sizes.
            outputs: The output for each.
        """
        self._sizes = sizes
        self._outputs = outputs

    def fake(self, batch: int | torch.SymInt) -> Any:
        """Return an output for ``batch``, every size being linear in the batch size.

        Raises:
            RungError: If some size is not.
        """

        def make(one: Any, other: Any) -> Any:
            if not isinstance(one, torch.Tensor):
                return one
            if one.dim() != other.dim():
                raise RungError("a module returns tensors of varying rank")
            return torch.empty([self._size(a, b, batch) for a, b in zip(one.shape, other.shape, strict=True)]).to(
                device=one.device, dtype=one.dtype
            )

        return pytree.tree_map(make, *self._outputs)

    def _size(self, one: int, other: int, batch: int | torch.SymInt) -> int | torch.SymInt:
        first, second = self._sizes
        slope, rest = divmod(other - one, second - first)
        if rest or one < slope * first:
            raise RungError(f"a module returns sizes {one} and {other} for batches of {first} and {second}")
        return slope * batch + (one - slope * first) if slope else one


Observed = dict[fx.Node, Seen]


def observe(
    shell: fx.GraphModule, leaves: Sequence[str], runs: Sequence[tuple[int, Sequence[torch.Tensor]]]
) -> Observed:
    """Run a graph for real and keep what its opaque modules return.

    Args:
        shell: The graph.
        leaves: Paths of the opaque modules.
        runs: Two batch sizes, with inputs of that size.
    """
    outputs: dict[fx.Node, list[Any]] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if n.op == "call_module" and n.target in leaves:
                outputs.setdefault(n, []).append(result)
            return result

    for _, tensors in runs:
        with torch.no_grad():
            Recorder(shell).run(*tensors, enable_io_processing=False)
    sizes = (runs[0][0], runs[1][0])
    return {node: Seen(sizes, (one, other)) for node, (one, other) in outputs.items()}


class ShapeWorld:
    """One fake mode, and fake inputs in it, for every graph of one capture.

    Attributes:
        mode: The fake tensor mode.
        placeholders: One fake tensor per placeholder.
        symbolic: Whether the batch size is a symbol.
    """

    def __init__(self, tensors: tuple[torch.Tensor, ...], batched: tuple[bool, ...], symbolic: bool = True) -> None:
        """Make fake inputs.

        Args:
            tensors: Real inputs, one per placeholder; a batch of at least two, since one is never symbolic.
            batched: Which of them have the batch in dimension 0.
            symbolic: False for plain sizes.
        """
        self.symbolic = symbolic
        self.mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        self.placeholders = tuple(
            self._fake(tensor, symbolic and of_batch) for tensor, of_batch in zip(tensors, batched, strict=True)
        )
        self._batched = batched

    def _fake(self, tensor: torch.Tensor, dynamic: bool) -> FakeTensor:
        # DUCK: inputs of one batch share one symbol
        first = DimDynamic.DUCK if dynamic else DimDynamic.STATIC
        context: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(
            dynamic_sizes=[first if i == 0 else DimDynamic.STATIC for i in range(tensor.dim())]
        )
        return self.mode.from_tensor(tensor.detach(), symbolic_context=context)

    @property
    def batch_is_symbolic(self) -> bool:
        """Whether the batch is still a symbol: a model that compares it with a number makes it a number."""
        for fake, of_batch in zip(self.placeholders, self._batched, strict=True):
            if of_batch:
                size = fake.shape[0]
                if isinstance(size, int) or size.node.maybe_as_int() is not None:
                    return False
        return True

    @property
    def batch(self) -> int | torch.SymInt:
        """The batch size: a symbol, or a number where none is possible."""
        sizes = [fake.shape[0] for fake, of_batch in zip(self.placeholders, self._batched, strict=True) if of_batch]
        return sizes[0]

    def annotate(self, shell: fx.GraphModule, model: nn.Module, opaque: Observed) -> None:
        """Write ``meta["val"]`` on every node of ``shell.graph``.

        Parameters and buffers of ``model`` are replaced by fakes meanwhile, so that nothing real is run or counted.

        Args:
            shell: The graph, grafted on ``model``.
            model: Owner of the modules.
            opaque: What the modules that cannot run on fake tensors were seen to return.

        Raises:
            RungError: If some node cannot be run on fake tensors.
        """
        with self._faked(model) as fakes:
            runner = _Annotator(shell, fakes, opaque, self.batch)
            try:
                # composite C++ kernels read sizes as plain integers; their Python forms keep them symbolic
                with self.mode, torch.no_grad(), enable_python_dispatcher():
                    runner.run(*self.placeholders, enable_io_processing=False)
            except Exception as error:
                where = runner.current.format_node() if runner.current is not None else ""
                raise RungError(f"shapes cannot be derived at {where}: {first_sentence(error)}") from error

    @contextmanager
    def _faked(self, model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
        real: dict[str, torch.Tensor] = {}
        real.update(model.named_parameters(remove_duplicate=False))
        real.update(model.named_buffers(remove_duplicate=False))
        memo: dict[torch.Tensor, torch.Tensor] = {}
        for tensor in real.values():
            if tensor not in memo:
                fake: torch.Tensor = self.mode.from_tensor(tensor, static_shapes=True)
                memo[tensor] = fake
        fakes = {name: memo[tensor] for name, tensor in real.items()}
        with _reparametrize_module(model, fakes):
            yield fakes


class _Annotator(fx.Interpreter):
    """Runs a graph on fake tensors and keeps what each node produced."""

    def __init__(
        self, shell: fx.GraphModule, fakes: dict[str, torch.Tensor], opaque: Observed, batch: int | torch.SymInt
    ) -> None:
        super().__init__(shell, garbage_collect_values=False)
        self._fakes = fakes
        self._opaque = opaque
        self._batch = batch
        self.current: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and record its value."""
        self.current = n
        result = self._opaque[n].fake(self._batch) if n in self._opaque else super().run_node(n)
        n.meta["val"] = result
        return result

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Fetch a fake parameter: the shell has the real ones at its root."""
        fake = self._fakes.get(target)
        return fake if fake is not None else super().get_attr(target, args, kwargs)


def make_world(inputs: Inputs, tensors: tuple[torch.Tensor, ...], symbolic: bool) -> ShapeWorld:
    """Return the world of ``tensors``, the placeholders' values in ``inputs``."""
    return ShapeWorld(tensors, tuple(inputs.is_batched(tensor) for tensor in tensors), symbolic)
