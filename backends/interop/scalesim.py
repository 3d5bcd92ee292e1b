"""A SCALE-Sim topology (github.com/scalesim-project/scale-sim-v3): the step's products as matrix products."""

from __future__ import annotations

import re
from pathlib import Path

from e2pass.backends.interop.files import write_text
from e2pass.backends.interop.products import StepProduct, step_products
from e2pass.backends.interop.zigzag import gemm
from e2pass.step.graph import TrainingGraph


def write_scalesim(graph: TrainingGraph, path: str | Path) -> Path:
    """Write forward, dX, dW and predictor products as a CSV of M, N, K, for ``scalesim -i gemm``.

    A convolution is the matrix product that an im2col makes of it. Of the equal products of a grouped convolution or of
    attention heads one is written, and its name ends in ``_xG``: multiply by G.

    Raises:
        InputError: If no file can be written there.
        ExportError: If a product has no loop nest; the message names it.
    """
    lines = ["Layer,M,N,K,"]
    taken: set[str] = set()
    for product in step_products(graph):
        suffix = f"_x{product.nest.g}" if product.nest.g > 1 else ""
        m, n, inner = gemm(product.nest)
        lines.append(f"{_name(product, suffix, taken)},{m},{n},{inner},")
    return write_text("\n".join(lines) + "\n", path)


def _name(product: StepProduct, suffix: str, taken: set[str]) -> str:
    """A name of letters, digits and underscores that no other layer has: SCALE-Sim's results go by it."""
    plain = re.sub(r"\W+", "_", f"{product.kind}_{product.name}", flags=re.ASCII)
    name, number = plain + suffix, 1
    while name.lower() in taken:
        number += 1
        name = f"{plain}_{number}{suffix}"
    taken.add(name.lower())
    return name
