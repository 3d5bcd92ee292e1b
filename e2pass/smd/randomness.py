"""Random sources that decide the order of a loader's samples: found, saved and put back."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Generator
from torch.utils.data import DataLoader

_LINKS = ("batch_sampler", "sampler", "dataset")
_MAX_OWNERS = 32  # proxies that answer to any attribute would otherwise be followed for ever


def owners(loader: object) -> list[object]:
    """Return ``loader`` and the samplers and datasets reachable from it, each once."""
    found = [loader]
    for owner in found:
        for link in _LINKS:
            linked = getattr(owner, link, None)
            if linked is not None and len(found) < _MAX_OWNERS and all(linked is not other for other in found):
                found.append(linked)
    return found


class RandomSources:
    """The random generators that a loader's samplers and datasets may draw from in the main process.

    These are the global ones (torch on the CPU, ``random``, ``numpy.random`` once numpy is imported) and the generators
    that the loader, its samplers and its dataset hold in an attribute of their own.

    States are made of numbers, strings, lists and tensors only, so ``torch.load(weights_only=True)`` reads them.
    """

    def __init__(self, holders: Sequence[object]) -> None:
        self._own: list[Any] = []
        for holder in holders:
            for value in getattr(holder, "__dict__", {}).values():
                if _is_generator(value) and all(value is not other for other in self._own):
                    self._own.append(value)

    def state(self) -> dict[str, Any]:
        """Return the state of every source."""
        version, words, gauss = random.getstate()
        state: dict[str, Any] = {
            "torch": torch.get_rng_state(),
            "python": [version, list(words), gauss],
            "own": self.own_state(),
        }
        if (numpy := sys.modules.get("numpy")) is not None:
            name, keys, *rest = numpy.random.get_state(legacy=True)
            state["numpy"] = [str(name), keys.tolist(), *rest]
        return state

    def restore(self, state: dict[str, Any]) -> None:
        """Put every source back into a state that ``state`` returned."""
        torch.set_rng_state(state["torch"])
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words), gauss))
        if "numpy" in state and (numpy := sys.modules.get("numpy")) is not None:
            numpy.random.set_state(tuple(state["numpy"]))
        self.restore_own(state["own"])

    def own_state(self) -> list[Any]:
        """Return the states of the generators that belong to the loader, its samplers and its dataset."""
        return [_get_state(generator) for generator in self._own]

    def restore_own(self, states: Sequence[Any]) -> None:
        """Put the loader's own generators back; ``states`` must be of a loader that has the same ones."""
        for generator, state in zip(self._own, states, strict=True):
            _set_state(generator, state)

    @contextmanager
    def replaying(self, *states: dict[str, Any] | None) -> Iterator[Callable[[], None]]:
        """Go back to ``states``: the first at once, the next at each call of the yielded function. Return at exit."""
        now = self.state()
        queue = iter(states)

        def go_on() -> None:
            if (state := next(queue, None)) is not None:
                self.restore(state)

        go_on()
        try:
            yield go_on
        finally:
            self.restore(now)


@contextmanager
def spare_generator(loader: DataLoader[Any], active: bool) -> Iterator[None]:
    """While ``active``, let ``iter(loader)`` draw the seed of its workers from a copy of the generator it would use.

    torch draws that seed whenever an iterator is made. A resumed run has already drawn it before it was saved, and must
    not draw from the restored generator again.
    """
    original = loader.generator
    if active:
        copied = Generator()
        copied.set_state((original or torch.default_generator).get_state())
        loader.generator = copied
    try:
        yield
    finally:
        loader.generator = original


def _is_generator(value: object) -> bool:
    if isinstance(value, (Generator, random.Random)):
        return True
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, (numpy.random.Generator, numpy.random.RandomState))


def _get_state(generator: Any) -> Any:
    if isinstance(generator, Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        version, words, gauss = generator.getstate()
        return [version, list(words), gauss]
    if hasattr(generator, "bit_generator"):
        return _plain(generator.bit_generator.state)
    name, keys, *rest = generator.get_state(legacy=True)
    return [str(name), keys.tolist(), *rest]


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        version, words, gauss = state
        generator.setstate((version, tuple(words), gauss))
    elif hasattr(generator, "bit_generator"):
        generator.bit_generator.state = state
    else:
        generator.set_state(tuple(state))


def _plain(value: Any) -> Any:
    """Return nested numpy values as lists and numbers."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value.tolist() if hasattr(value, "tolist") else value
