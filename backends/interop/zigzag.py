"""A ZigZag workload (github.com/KULeuven-MICAS/zigzag, 3.9): the step's products as a YAML list of layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from e2pass.backends.fpga.nest import Nest
from e2pass.backends.interop.files import write_text
from e2pass.backends.interop.products import StepProduct, step_products
from e2pass.step.graph import TrainingGraph

ACCUMULATOR_BITS = 32


def write_zigzag(graph: TrainingGraph, path: str | Path) -> Path:
    """Write forward, dX, dW and predictor products as a workload; each layer's name says which it is.

    A one-dimensional convolution has a second window of size 1. The input gradient of a strided convolution, whose
    output would slide, is written as the matrix product of its MACs, before overlaps are summed.

    Raises:
        InputError: If no file can be written there.
        ExportError: If a product has no loop nest, or more than two windows; the message names it.
    """
    layers = [_layer(number, product) for number, product in enumerate(step_products(graph))]
    return write_text(yaml.safe_dump(layers, sort_keys=False, width=120), path)


def _layer(number: int, product: StepProduct) -> dict[str, Any]:
    nest = product.nest
    first, second = nest.reads
    layer: dict[str, Any] = {"id": number, "name": f"{product.kind}:{product.name}"}
    if not nest.windows or len(nest.windows) > 2 or (nest.writes == "x" and any(w.stride > 1 for w in nest.windows)):
        layer |= _matrix_product(nest)
    else:
        layer |= _convolution(nest)
    bits = {"I": nest.bits(first), "W": nest.bits(second), "O": ACCUMULATOR_BITS, "O_final": nest.bits(nest.writes)}
    return layer | {"operand_precision": bits, "operand_source": {}}


def gemm(nest: Nest) -> tuple[int, int, int]:
    """Rows, columns and inner size of the matrix product with the MACs of one group of a nest."""
    outputs, weights = nest.b * nest.positions, nest.c * nest.taps
    if nest.writes == "w":
        return weights, nest.k, outputs
    return (outputs, nest.k, weights) if nest.writes == "y" else (outputs, weights, nest.k)


def _matrix_product(nest: Nest) -> dict[str, Any]:
    m, n, inner = gemm(nest)
    group = "[g]" if nest.g > 1 else ""
    sizes = ({"G": nest.g} if nest.g > 1 else {}) | {"B": m, "K": n, "C": inner}
    return {
        "operator_type": "Gemm",
        "equation": f"O{group}[b][k]+=I{group}[b][c]*W{group}[k][c]",
        "dimension_relations": [],
        "loop_dims": list(sizes),
        "loop_sizes": list(sizes.values()),
    }


def _convolution(nest: Nest) -> dict[str, Any]:
    windows = (*nest.windows, *[None] * (2 - len(nest.windows)))
    rows, columns = windows if len(nest.windows) == 2 else (None, windows[0])
    assert columns is not None
    group = "[g]" if nest.g > 1 else ""
    sizes = {"B": nest.b, **({"G": nest.g} if nest.g > 1 else {}), "K": nest.k, "C": nest.c}
    sizes |= {"OY": rows.out if rows else 1, "OX": columns.out}
    sizes |= {"FY": rows.kernel if rows else 1, "FX": columns.kernel}
    dims = {"x": f"[b]{group}[c][iy][ix]", "w": f"{group}[k][c][fy][fx]", "y": f"[b]{group}[k][oy][ox]"}
    first, second = nest.reads
    row = (rows.stride, rows.dilation, rows.padding, rows.size) if rows else (1, 1, 0, 1)
    return {
        "operator_type": "Conv",
        "equation": f"O{dims[nest.writes]}+=I{dims[first]}*W{dims[second]}",
        "dimension_relations": [
            f"ix={columns.stride}*ox+{columns.dilation}*fx",
            f"iy={row[0]}*oy+{row[1]}*fy",
        ],
        "loop_dims": list(sizes),
        "loop_sizes": list(sizes.values()),
        "pr_loop_dims": ["IX", "IY"],
        "pr_loop_sizes": [columns.size, row[3]],
        "padding": [[columns.padding] * 2, [row[2]] * 2],
    }
