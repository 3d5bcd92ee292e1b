"""From a region of the forward graph to its joint forward+backward graph, and on to the two halves that run."""

from e2pass.lowering.joint import Joint, ValueSpec
from e2pass.lowering.partition import Halves, partition
from e2pass.lowering.reuse import lower

__all__ = ["Halves", "Joint", "ValueSpec", "lower", "partition"]
