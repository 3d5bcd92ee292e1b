"""The optimizer's update of one parameter: arguments are weight, gradient and optimizer states."""

from __future__ import annotations

from e2pass.backends.fpga.formulas.common import DIVIDE, SQRT, size, tensor, width
from e2pass.backends.fpga.registry import register_cost
from e2pass.backends.fpga.workload import Alu, Work
from e2pass.cost import OpSite, TensorSpec

STEP = Alu(2, 2)
"""Weight decay added to the gradient, and the scaled step taken from the weight."""
MOMENTUM = Alu(1, 1)
ADAM = STEP.plus(Alu(2, 5)).plus(SQRT).plus(Alu(1, 0)).plus(DIVIDE)
"""Both moving averages, root, epsilon and quotient; bias corrections are one factor for the whole tensor."""

PER_ELEMENT: dict[str, Alu] = {
    "optimizer.sgd": STEP,
    "optimizer.sgd_momentum": STEP.plus(MOMENTUM),
    "optimizer.sgd_nesterov": STEP.plus(MOMENTUM.times(2)),
    "optimizer.adam": ADAM,
    "optimizer.adamw": ADAM,
    "optimizer.rmsprop": STEP.plus(Alu(2, 3)).plus(SQRT).plus(DIVIDE),
    "optimizer.adagrad": STEP.plus(Alu(2, 1)).plus(SQRT).plus(DIVIDE),
    "e2pass.sgd_update": STEP.plus(MOMENTUM),
}
"""Operations per element of the weight."""


@register_cost(*PER_ELEMENT)
def update(site: OpSite) -> Work:
    """Weight, gradient and states are read; weight and states are written."""
    weight, gradient = tensor(site, 0), tensor(site, 1)
    states = [value for value in site.args[2:] if isinstance(value, TensorSpec)]
    op = site.op if site.op in PER_ELEMENT else site.op.rpartition(".")[0]
    return Work(
        f"update: weight, gradient and {len(states)} states read, weight and states written",
        read_bytes=size((weight, gradient, *states)),
        write_bytes=size((weight, *states)),
        alu=PER_ELEMENT[op].times(weight.numel),
        alu_bits=width(weight, gradient, *states),
    )
