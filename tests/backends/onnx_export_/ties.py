"""How near each weight's selected gradient is to another sign, measured in PyTorch's own backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from e2pass.lowering.partition import ancestors
from e2pass.lowering.products import LAYOUT_OPS
from e2pass.transformed import Transformed

aten = torch.ops.aten
_SUMS = (aten.add.Tensor, aten.sum.dim_IntList)


class _Recorder(fx.Interpreter):
    """Runs a backward half and keeps, for each weight with a predicted sign, how near a tie is."""

    def __init__(self, module: fx.GraphModule, names: list[tuple[str, Any]], margins: dict[str, Tensor]) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.margins = margins
        self.selects: dict[str, fx.Node] = {}
        outputs: Any = self.graph.output_node().args[0]
        for (kind, key), value in zip(names, outputs, strict=True):
            if kind == "grad" and key[0] == "param" and isinstance(value, fx.Node):
                found = [n for n in ancestors([value]) if n.target is torch.ops.e2pass.select.default]
                if found:
                    self.selects[key[1]] = max(found)

    def __call__(self, arguments: list[Any]) -> Any:
        results = self.run(*arguments)
        for name, node in self.selects.items():
            predicted, full, tau = (self.env[a] for a in node.args)  # type: ignore[index]
            size = self._magnitude(node.args[1]).clamp_min(torch.finfo(torch.float32).tiny)  # type: ignore[arg-type]
            guess = self._magnitude(node.args[0]).clamp_min(torch.finfo(torch.float32).tiny)  # type: ignore[arg-type]
            to_threshold = (predicted.abs() - tau).abs() / guess.max()
            zero = torch.where(predicted.abs() >= tau, predicted.abs() / guess, full.abs() / size)
            self.margins[name] = torch.minimum(zero, to_threshold)
        self.env = {}
        return results

    def _magnitude(self, node: fx.Node) -> Tensor:
        """The gradient with every product of two numbers replaced by its magnitude: what rounding is relative to."""
        if node.target in LAYOUT_OPS or node.target in _SUMS or getattr(node.target, "__name__", "") == "getitem":
            args = fx.node.map_arg(
                node.args,
                lambda n: self._magnitude(n) if isinstance(n.meta.get("val"), Tensor | tuple) else self.env[n],
            )
            return node.target(*args, **node.kwargs)  # type: ignore[operator, no-any-return]
        args = fx.node.map_arg(node.args, lambda n: v.abs() if isinstance(v := self.env[n], Tensor) else v)
        return node.target(*args, **node.kwargs)  # type: ignore[operator, no-any-return]


@contextmanager
def ties(t: Transformed) -> Iterator[dict[str, Tensor]]:
    """Yields a dict that backward passes within fill: for each weight, each element's distance from a tie.

    It is the smaller of the selected gradient's magnitude, relative to the sum of magnitudes it adds up, and of the
    predicted one's distance from the threshold, relative to the largest such sum in the tensor (the threshold is a
    share of the largest element).
    """
    margins: dict[str, Tensor] = {}
    cache = t.model._executable.cache
    held = []
    if cache is not None:
        for compiled in (c for entries in cache.entries.values() for c in entries):
            held.append((compiled, compiled.backward))
            compiled.backward = _Recorder(compiled.halves.backward, compiled.halves.backward_outputs, margins)
    try:
        yield margins
    finally:
        for compiled, backward in held:
            compiled.backward = backward
