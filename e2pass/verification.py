"""Equality proofs: what a transformed model must have in common with the original, run on the example inputs."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from e2pass.capture.copies import copied
from e2pass.capture.output import opened
from e2pass.program import Program
from e2pass.runtime.module import E2Module


@dataclass(frozen=True)
class Proof:
    """One equality: what was compared, whether it holds, and the largest relative difference."""

    name: str
    holds: bool
    difference: float
    tolerance: float


@dataclass(frozen=True)
class VerifyReport:
    """All proofs; truthy if every one holds."""

    proofs: tuple[Proof, ...]

    def __bool__(self) -> bool:
        return all(p.holds for p in self.proofs)

    def __str__(self) -> str:
        marks = {True: "ok  ", False: "FAIL"}
        return "\n".join(
            f"{marks[p.holds]} {p.name}: largest difference {p.difference:.1e}, allowed {p.tolerance:.0e}"
            for p in self.proofs
        )


def verify(model: E2Module, program: Program) -> VerifyReport:
    """Compare a copy of ``model`` with its source: gates open and quantization off, then gathered against masked."""
    plain = model.neutral_copy()
    proofs = [_compare(plain, program, training) for training in (True, False)]
    if model.e2_slu is not None:
        proofs.append(_gather_equals_mask(model, program))
    return VerifyReport(tuple(p for group in proofs for p in group))


def _compare(plain: E2Module, program: Program, training: bool) -> list[Proof]:
    original = copied(plain.source()).train(training)
    transformed = copy.deepcopy(plain).train(training)
    results = []
    for module in (original, transformed):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            results.append(_step(module, program))
    mode = "training" if training else "evaluation"
    names = ("outputs", "gradients", "buffers")
    return [
        _proof(f"{mode} {name} with gates open", a, b, 1e-4)
        for name, a, b in zip(names, *results, strict=True)
        if training or name != "gradients"
    ]


def _step(module: nn.Module, program: Program) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    inputs = program.inputs.with_batch(program.inputs.batch_size)
    outputs = [t for t in tree_leaves(opened(module(*inputs.args, **inputs.kwargs))) if isinstance(t, Tensor)]
    buffers = [b.clone() for n, b in module.named_buffers() if not n.startswith("e2_")]  # checkpoints write in backward
    floating = [t for t in outputs if t.is_floating_point() and t.requires_grad]
    if floating and module.training:
        sum((t.float() * torch.linspace(-1, 1, t.numel()).view(t.shape)).sum() for t in floating).backward()  # type: ignore[union-attr]
    gradients = {n: p.grad for n, p in module.named_parameters() if not n.startswith("e2_")}
    return (
        outputs,
        [torch.zeros(()) if g is None else g for g in gradients.values()],
        buffers,
    )


def _gather_equals_mask(model: E2Module, program: Program) -> list[Proof]:
    inputs = program.inputs
    both = []
    for masked in (False, True):
        twin = copy.deepcopy(model).eval()
        with torch.no_grad():
            result = twin.execute(inputs.args, inputs.kwargs, masked=masked)
        both.append([t for t in tree_leaves(opened(result)) if isinstance(t, Tensor)])
    return [_proof("evaluation outputs, skipped for real against masked", both[0], both[1], 1e-4)]


def _proof(name: str, a: list[Tensor], b: list[Tensor], tolerance: float) -> Proof:
    difference = float("inf") if len(a) != len(b) else max(map(relative_difference, a, b), default=0.0)
    return Proof(name, difference <= tolerance, difference, tolerance)


def relative_difference(a: Tensor, b: Tensor, least: float = 1e-6) -> float:
    """Largest difference of an element of ``b`` from that of ``a``, over the largest finite magnitude in ``a``.

    NaN equals NaN, and infinities those of the same sign; against anything else they are infinitely apart, as tensors
    of different shapes are.

    Args:
        a: What is right; any shape.
        b: What is compared with it.
        least: The smallest magnitude to divide by.
    """
    if a.shape != b.shape:
        return float("inf")
    if a.numel() == 0:
        return 0.0
    a, b = a.detach().double(), b.detach().double()
    apart = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs()).nan_to_num(torch.inf, torch.inf)
    return float(apart.max()) / max(float(a.nan_to_num(0.0, 0.0, 0.0).abs().max()), least)
