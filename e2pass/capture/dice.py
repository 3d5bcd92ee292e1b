"""Dice that a model throws in Python, as LayerDrop does: a graph would hold one throw for ever.

A model is run with the generators in states that throw nearly 0, nearly 1 and something in between. Where it then does
something else, what it does is a matter of chance; where it does not, as with ``layerdrop=0.0``, the throw is idle.
Numbers that PyTorch draws count only where Python reads them: all others are operations of the graph.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from e2pass.capture.generators import THROWS, Generator, generators_of, states_kept, torch_states
from e2pass.capture.origin import current_line, is_user_file, line_of_frame
from e2pass.capture.state import model_kept, rng_kept
from e2pass.capture.verify import difference, run

DRAWS = frozenset(
    {"rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "bernoulli", "normal"}
    | {"multinomial", "poisson", "binomial", "bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_"}
    | {"normal_", "random_", "uniform_"}
)
_READS = frozenset(
    {"__bool__", "__int__", "__float__", "__index__", "item", "tolist", "numpy", "__array__", "equal", "allclose"}
)


Outcomes = tuple[Any, ...]

INSTEAD_OF_CHANCE = 'set the probability there to 0 (as layerdrop=0.0), and let SLU(gate="random") drop blocks instead'


def by_chance(line: str) -> str:
    """What a model does that cannot be captured, in words."""
    return f"decides by a random number in Python at {line}, and a graph would hold one throw for ever"


@dataclass(frozen=True)
class Dice:
    """What Python makes of random numbers in one mode of a model.

    Attributes:
        line: Line of the model's code that decides by chance; ``""`` if what the model does does not depend on it.
        outcomes: What Python reads of PyTorch's draws, in order; the same at every throw where ``line`` is empty.
    """

    line: str
    outcomes: Outcomes


def dice_of(model: nn.Module, call: Callable[[], Any], training: bool) -> Dice:
    """Find out whether what ``call`` does with ``model`` is decided by chance in Python.

    Args:
        model: The model; it is put back into its state.
        call: Calls the model, the same way each time.
        training: The mode to look at.
    """
    generators = generators_of(model)
    states = torch_states()
    with states_kept(generators), rng_kept(), model_kept(model):
        model.train(training)
        watch = _Watch(states[0])
        tracer = _LineOfDraw(generators)
        with watch, tracer:
            call()
    lines = [*tracer.lines, *watch.lines]
    if not lines:
        return Dice("", ())

    with states_kept(generators):
        first = run(model, functools.partial(_thrown, call, generators, 0), training)
        for throw in range(1, THROWS):
            if difference(first, run(model, functools.partial(_thrown, call, generators, throw), training)):
                return Dice(lines[0], ())
    return Dice("", tuple(watch.outcomes))


def difference_at_any_throw(model: nn.Module, one: Callable[[], Any], other: Callable[[], Any], training: bool) -> str:
    """In which respect two ways to run ``model`` differ at some throw of its dice, ``""`` where in none."""
    generators = generators_of(model)
    with states_kept(generators):
        for throw in range(THROWS):
            first, second = (
                run(model, functools.partial(_thrown, call, generators, throw), training) for call in (one, other)
            )
            found = difference(first, second)
            if found:
                return found
    return ""


def _thrown(call: Callable[[], Any], generators: Sequence[Generator], throw: int) -> Any:
    for generator in generators:
        generator.write(generator.throws[throw])
    with _Watch(torch_states()[throw]):
        return call()


class _Follow(TorchFunctionMode):
    """Follows what PyTorch draws, through operations on nothing else, up to where Python reads it.

    Noise on activations is no die, and is not followed.
    """

    def __init__(self) -> None:
        super().__init__()
        self._drawn: dict[int, torch.Tensor] = {}  # by id, which stays theirs as long as they are held here

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call ``func``, or what stands for it."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in DRAWS:
            return self._held(self.draw(func, args, kwargs))
        tensors = [a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
        if not tensors or any(id(t) not in self._drawn for t in tensors):
            return func(*args, **kwargs)
        if name in _READS:
            return self.read(func, args, kwargs)
        return self._held(func(*args, **kwargs))

    def draw(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Draw random numbers."""
        return func(*args, **kwargs)

    def read(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Give Python what was drawn."""
        return func(*args, **kwargs)

    def _held(self, result: Any) -> Any:
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._drawn[id(leaf)] = leaf
        return result


class _Watch(_Follow):
    """Lets draws fall as another generator throws them, and notes what Python reads of them, and where.

    The model's own stream of random numbers goes on as if nothing had happened.
    """

    def __init__(self, state: torch.Tensor) -> None:
        super().__init__()
        self._state = state
        self.lines: list[str] = []
        self.outcomes: list[Any] = []

    def draw(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Draw twice: for the model's stream, and from the other state."""
        result = func(*args, **kwargs)
        generator = kwargs.get("generator") or torch.default_generator
        if generator.device.type != "cpu":
            return result
        after = generator.get_state()
        generator.set_state(self._state)
        result = func(*args, **kwargs)
        self._state = generator.get_state()
        generator.set_state(after)
        return result

    def read(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note line and value."""
        self.lines.append(current_line())
        self.outcomes.append(func(*args, **kwargs))
        return self.outcomes[-1]


class Settled(_Follow):
    """Gives Python the known outcomes of idle throws, which cannot be had of numbers that are only traced."""

    def __init__(self, outcomes: Outcomes) -> None:
        super().__init__()
        self._outcomes = iter(outcomes)

    def read(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the next outcome."""
        for outcome in self._outcomes:
            return outcome
        return func(*args, **kwargs)


class _LineOfDraw:
    """Notes the lines of the model's code in which Python's or numpy's generators move on."""

    def __init__(self, generators: Sequence[Generator]) -> None:
        self._generators = generators
        self._states: list[bytes] = []
        self._at = ""
        self.lines: list[str] = []

    def __enter__(self) -> None:
        self._states = [generator.fingerprint() for generator in self._generators]
        self._before = sys.gettrace()
        sys.settrace(self._enter)

    def __exit__(self, *error: object) -> None:
        sys.settrace(self._before)
        self._look()

    def _enter(self, frame: FrameType, event: str, arg: Any) -> Any:
        return self._step if is_user_file(frame.f_code.co_filename) else None

    def _step(self, frame: FrameType, event: str, arg: Any) -> Any:
        self._look()
        if event == "return" and frame.f_back is not None:
            self._at = line_of_frame(frame.f_back)
        else:
            self._at = line_of_frame(frame)
        return self._step

    def _look(self) -> None:
        states = [generator.fingerprint() for generator in self._generators]
        if states != self._states:
            self._states = states
            self.lines.append(self._at)
