"""The outlined program: regions, gates and merges in execution order. Immutable; it holds names, never tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import fx

from e2pass.lowering.joint import ValueSpec

Mode = Literal["train", "eval"]


@dataclass(frozen=True)
class ValueName:
    """A value of the plan, in place of a node in the structure of its output."""

    name: str


@dataclass(frozen=True, eq=False)
class Region:
    """A piece of the forward graph between gates: what runs, is lowered and is priced as one.

    Attributes:
        name: ``trunk_3``, or ``body_layer1_0`` for the body of a gated block.
        graph: Its own graph; placeholders are ``inputs``, the output node returns a tuple of ``outputs``.
        inputs: Names of the values it reads.
        outputs: Names of the values it produces.
        specs: Shape, dtype and gradient of each input.
        rows: For each input how many rows it has per sample; 0 if it does not grow with the batch.
        block: Index of the gated block whose body it is, None for a trunk.
        needs_two: Whether a batch norm in it sees one value per sample and channel, so that a batch of one has no
            variance.
        paths: Module path of the user's model for each node of ``graph``.
        blocks: Name of the residual block each node belongs to, gated or not.
    """

    name: str
    graph: fx.Graph
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    specs: tuple[ValueSpec, ...]
    rows: tuple[int, ...]
    block: int | None = None
    needs_two: bool = False
    paths: dict[str, str] = field(default_factory=dict)
    blocks: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RunRegion:
    """Run a trunk region on the whole batch."""

    region: Region
    release: tuple[str, ...] = ()


@dataclass(frozen=True)
class Decide:
    """Ask gate ``index`` which samples of ``fork`` enter its block."""

    index: int
    fork: str
    previous: str | None
    out: str
    release: tuple[str, ...] = ()


@dataclass(frozen=True)
class Skip:
    """Run ``body`` on the samples whose gate is open and add its outputs, one after the other, to the shortcut."""

    index: int
    body: Region
    gate: str
    shortcut: str
    out: str
    release: tuple[str, ...] = ()


Step = RunRegion | Decide | Skip


@dataclass(frozen=True, eq=False)
class Beside:
    """What the model returns beside values of its regions: parameters, constants and sizes.

    Attributes:
        graph: Fetches and measures them; placeholders are ``inputs``, the output node returns a tuple of ``outputs``.
        inputs: Names of the values it looks at.
        outputs: Names of what it finds.
    """

    graph: fx.Graph
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Plan:
    """Execution order of one mode.

    Attributes:
        steps: What to do.
        inputs: Names of the values that the call brings, in the order of ``Capture.bind``.
        output: Argument of the graph's output node, with value names in place of nodes.
        beside: What ``output`` names that is no value of a region and no input.
    """

    steps: tuple[Step, ...]
    inputs: tuple[str, ...]
    output: object
    beside: Beside

    @property
    def regions(self) -> list[Region]:
        """All regions in execution order, bodies included."""
        return [s.region if isinstance(s, RunRegion) else s.body for s in self.steps if not isinstance(s, Decide)]
