"""How far one pass over a loader has come."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Progress:
    """One pass over the loader, as far as it has come.

    Attributes:
        epoch: Number of the epoch, from 0.
        length: Nominal number of batches in it; None if unknown.
        position: Nominal steps that the user has passed: the last batch yielded and everything before it.
        yielded: Batches handed to the user, those before a resume included.
        resumed: How many of them were handed out before a resume.
        pulled: Nominal batches taken from the sampler or stream; workers run ahead, so ``pulled >= position``.
        exhausted: The sampler has come to its end.
        finished: The user has seen the end of the epoch.
        seeded: torch has already drawn the seed of this pass's workers; a resumed run must not draw it again.
        before_iter: Random state just before the stream's iterator was made.
        before_first: Random state just before the first batch was pulled.
        in_flight: For each kept batch that is sampled but not yet yielded, the position after it.
    """

    epoch: int
    length: int | None
    position: int = 0
    yielded: int = 0
    resumed: int = 0
    pulled: int = 0
    exhausted: bool = False
    finished: bool = False
    seeded: bool = False
    before_iter: dict[str, Any] | None = None
    before_first: dict[str, Any] | None = None
    in_flight: deque[int] = field(default_factory=deque)

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the work in flight, which a resumed run samples again."""
        return {name: value for name, value in vars(self).items() if name not in ("finished", "in_flight")}
