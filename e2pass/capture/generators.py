"""The random generators that a model's Python code may draw from, and states of them that bring out every decision."""

from __future__ import annotations

import pickle
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

THROWS = 5
"""Nearly 0, nearly 1, and three in between: a comparison with a probability shows in the first two."""

_WORDS = 624  # of the state of a Mersenne twister, which is what torch, Python and numpy draw from
_SEEDS = range(3, THROWS + 1)


def _untempered(output: int) -> int:
    """The state word of a Mersenne twister from which it makes ``output`` (Matsumoto and Nishimura 1998, section 2)."""
    word = output ^ (output >> 18)
    word ^= (word << 15) & 0xEFC60000
    step = word
    for _ in range(4):
        step = word ^ ((step << 7) & 0x9D2C5680)
    word = step & 0xFFFFFFFF
    step = word
    for _ in range(2):
        step = word ^ (step >> 11)
    return step


_EXTREMES = (_untempered(64), _untempered(0xFFFFFFFF))  # 64: about 1e-8 as a double, and 4e-6 as a float


@dataclass(frozen=True)
class Generator:
    """One generator: how to read and write its state, and one state a throw."""

    read: Callable[[], Any]
    write: Callable[[Any], object]
    throws: Sequence[Any]

    def fingerprint(self) -> bytes:
        """The present state, as something that can be compared."""
        return pickle.dumps(self.read())


def generators_of(model: nn.Module) -> list[Generator]:
    """Python's and numpy's generators, and those that the modules of ``model`` hold as attributes."""
    numpy: Any = sys.modules.get("numpy.random")
    found = [Generator(random.getstate, random.setstate, _of_python())]
    if numpy is not None:
        found.append(Generator(numpy.get_state, numpy.set_state, _of_numpy()))
    held = {id(v): v for module in model.modules() for v in vars(module).values()}
    for value in held.values():
        if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
            found.append(Generator(value.getstate, value.setstate, _of_python()))
        elif numpy is not None and isinstance(value, numpy.RandomState):
            found.append(Generator(value.get_state, value.set_state, _of_numpy()))
        elif numpy is not None and isinstance(value, numpy.Generator):
            found.append(_of_bits(value.bit_generator))
    return found


@contextmanager
def states_kept(generators: Sequence[Generator]) -> Iterator[None]:
    """Restore the states on exit."""
    states = [generator.read() for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.write(state)


def torch_states() -> list[torch.Tensor]:
    """States of PyTorch's generator on the CPU, one a throw."""
    states = []
    for word in _EXTREMES:
        state = torch.Generator().manual_seed(0).get_state()
        raw = state.numpy()
        raw[8:12].view("int32")[0] = _WORDS  # words left, of them the next: 64-bit words follow from byte 16 on
        raw[16:24].view("uint64")[0] = 0
        raw[24 : 24 + 8 * _WORDS].view("uint64")[:] = word
        states.append(state)
    return [*states, *(torch.Generator().manual_seed(seed).get_state() for seed in _SEEDS)]


def _of_python() -> list[Any]:
    extremes: list[Any] = [(3, (word,) * _WORDS + (0,), None) for word in _EXTREMES]
    return [*extremes, *(random.Random(seed).getstate() for seed in _SEEDS)]


def _of_numpy() -> list[Any]:
    import numpy

    extremes: list[Any] = [("MT19937", numpy.full(_WORDS, word, numpy.uint32), 0) for word in _EXTREMES]
    return [*extremes, *(numpy.random.RandomState(seed).get_state() for seed in _SEEDS)]


def _of_bits(bits: Any) -> Generator:
    """Of a numpy generator of whatever kind: its states are its own, so all throws are in between."""
    return Generator(
        read=lambda: bits.state,
        write=lambda state: setattr(bits, "state", state),
        throws=[type(bits)(seed).state for seed in range(THROWS)],
    )
