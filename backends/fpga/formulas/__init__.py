"""Formulas for the operators of training graphs, one module a family; importing this package registers them all."""

from e2pass.backends.fpga.formulas import (
    attention,
    data,
    elementwise,
    free,
    losses,
    norms,
    pooling,
    products,
    quantization,
    reductions,
    update,
)

__all__ = [
    "attention",
    "data",
    "elementwise",
    "free",
    "losses",
    "norms",
    "pooling",
    "products",
    "quantization",
    "reductions",
    "update",
]
