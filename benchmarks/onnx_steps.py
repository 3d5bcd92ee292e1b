"""Single training steps of PyTorch and onnxruntime from the same state, compared."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from benchmarks.onnx_pair import BATCH, Arrays, Pair, other_kernels, session
from e2pass.backends.onnx_export import training_state
from tests.backends.onnx_export_.identical import Checker, recorded

STEPS = 20


def steps(pair: Pair, folder: Path) -> dict[str, Any]:
    """Each step from PyTorch's own state; the state stays where it was."""
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(1)
    lowered = pair.t.model._executable.cache is not None
    comparison = GivenCodes(pair, folder) if lowered else FullPrecision(pair)
    tally = Tally()
    with pair.put_back():
        pair.t.model.train()
        for _ in range(STEPS):
            where = torch.randint(0, len(pair.y), (BATCH,), generator=generator)
            other = signs_by_other_kernels(pair, where)
            found, loss = comparison.step(where)
            tally.add(pair, found, loss, other)
        slu = pair.t.stats().get("slu")
    skip_ratio = slu["skip_ratio"] if slu else None
    return {"export_cpu_s": pair.export_s, **dataclasses.asdict(tally), **comparison.result(), "skip_ratio": skip_ratio}


@dataclasses.dataclass
class Tally:
    """What whole steps showed; codes are free.

    Attributes:
        signs: Elements of gradients.
        equal: Of them, those whose sign is PyTorch's.
        equal_by_other_kernels: Those whose sign in PyTorch without oneDNN is that of PyTorch with it.
        equal_share: ``equal / signs``, and ``equal_share_worst_step`` the smallest of a step.
        loss_difference: The largest, relative.
        gate_decisions_apart: Decisions that only one of the two took.
    """

    signs: int = 0
    equal: int = 0
    equal_by_other_kernels: int = 0
    equal_share: float = 1.0
    equal_share_worst_step: float = 1.0
    loss_difference: float = 0.0
    gate_decisions_apart: int = 0

    def add(self, pair: Pair, found: Arrays, loss: float, other: Arrays) -> None:
        """Count a step that PyTorch has just done."""
        signs = {n: np.sign(g) for n, g in gradients(pair.t.model).items()}
        count = sum(s.size for s in signs.values())
        same = sum(int((np.sign(found[f"grad.{n}"]) == s).sum()) for n, s in signs.items())
        self.signs += count
        self.equal += same
        self.equal_by_other_kernels += sum(int((other[n] == s).sum()) for n, s in signs.items())
        self.equal_share = self.equal / self.signs
        self.equal_share_worst_step = min(self.equal_share_worst_step, same / count)
        self.loss_difference = max(self.loss_difference, abs(float(found["loss"]) - loss) / loss)
        slu = pair.t.model.e2_slu
        if slu is not None:
            self.gate_decisions_apart += int(np.abs(found["next.e2_slu.opened"] - slu.opened.numpy()).sum())


class GivenCodes:
    """Each step of a model in low precision, and of its halves once more with PyTorch's codes for both."""

    def __init__(self, pair: Pair, folder: Path) -> None:
        self.pair, self.checker = pair, Checker(folder)
        self.worst: dict[str, float] = {}

    def step(self, where: Any) -> tuple[Arrays, float]:
        """One step in both; returns onnxruntime's results and PyTorch's loss."""
        found = self.pair.onnx_step(where, self.pair.state())
        with recorded(self.pair.t) as records:
            loss = self.pair.torch_step(where)
        free = {n.removeprefix("grad."): value for n, value in found.items() if n.startswith("grad.")}
        self.checker.add(records, free)
        raise_to(self.worst, differences(self.pair, found))
        return found, loss

    def result(self) -> dict[str, Any]:
        return {"given_codes": dataclasses.asdict(self.checker.found), "differences": self.worst}


class FullPrecision:
    """Each step of a model in full precision, and once more in PyTorch with every activation on onnxruntime's side."""

    def __init__(self, pair: Pair) -> None:
        self.pair, self.activations = pair, OnnxActivations(pair.path)
        self.distances: list[float] = []
        self.signs, self.equal, self.worst_step = 0, 0, 1.0
        self.worst: dict[str, float] = {}
        self.worst_on_own_sides: dict[str, float] = {}
        self.mismatches = Mismatches()

    def step(self, where: Any) -> tuple[Arrays, float]:
        """One step in both; returns onnxruntime's results and PyTorch's loss."""
        found = self.pair.onnx_step(where, self.pair.state(), self.activations.session)
        sides = self.activations.values(found)
        double = gradients_in_double(self.pair, where, sides)
        with self.pair.put_back():
            with GivenSides(sides) as given:
                self.pair.torch_step(where)
            if self.activations.expected and not given.calls:
                raise RuntimeError("the file has activations with a kink, but none was seen in PyTorch")
            self.distances += given.distances
            raise_to(self.worst, differences(self.pair, found))
            self.count(found, gradients(self.pair.t.model), double)
        loss = self.pair.torch_step(where)
        raise_to(self.worst_on_own_sides, differences(self.pair, found))
        return found, loss

    def count(self, found: Arrays, single: Arrays, double: Arrays) -> None:
        same = sum(int((np.sign(found[f"grad.{n}"]) == np.sign(g)).sum()) for n, g in single.items())
        count = sum(g.size for g in single.values())
        self.signs, self.equal = self.signs + count, self.equal + same
        self.worst_step = min(self.worst_step, same / count)
        self.mismatches.add(found, single, double)

    def result(self) -> dict[str, Any]:
        return {
            "activations_on_another_side": len(self.distances),
            "their_distance_of_peak": max(self.distances, default=0.0),
            "differences": self.worst_on_own_sides,
            "given_sides": {
                "equal_share": self.equal / self.signs,
                "equal_share_worst_step": self.worst_step,
                "differences": self.worst,
                "unequal_signs": self.mismatches.result(),
            },
        }


KINKED: dict[Any, Callable[..., tuple[float, float]]] = {
    functional.relu: lambda *_, **__: (0.0, float("inf")),
    torch.relu: lambda *_, **__: (0.0, float("inf")),
    functional.relu6: lambda *_, **__: (0.0, 6.0),
    functional.hardtanh: lambda min_val=-1.0, max_val=1.0, *_, **__: (min_val, max_val),
}
"""Activations, and the places of their kinks by what the call has beside its input."""


class GivenSides(TorchFunctionMode):
    """ReLU and hard tanh take each value as on the side of the kink on which onnxruntime found it.

    Attributes:
        calls: Activations seen.
        distances: How far from its kink each value lies that was on another side, relative to the peak.
    """

    def __init__(self, values: list[np.ndarray[Any, Any]]) -> None:
        super().__init__()
        self.values, self.calls = values, 0
        self.distances: list[float] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function not in KINKED:
            return function(*args, **(kwargs or {}))
        x, (low, high) = args[0], KINKED[function](*args[1:], **(kwargs or {}))
        before = x.detach().numpy().copy()
        result = function(*args, **(kwargs or {}))
        self.calls += 1
        theirs = self.counterpart(before, result.detach().numpy())
        below, above = theirs <= low, theirs >= high
        other = ((before <= low) != below) | ((before >= high) != above)
        if not other.any():
            return result
        peak = float(np.abs(before).max())
        self.distances += (np.minimum(np.abs(before - low), np.abs(before - high))[other] / peak).tolist()
        return torch.where(torch.from_numpy(below), low, torch.where(torch.from_numpy(above), high, x))

    def counterpart(self, before: np.ndarray[Any, Any], after: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """What onnxruntime had of the activation: what went in, or what came out."""
        pairs = [(v, mine) for v in self.values if v.shape == before.shape for mine in (before, after)]
        closest, mine = min(pairs, key=lambda pair: float(np.abs(pair[0] - pair[1]).max()))
        if float(np.abs(closest - mine).max()) > 1e-3 * float(np.abs(mine).max()):
            raise RuntimeError(f"no output of the file is the activation of shape {before.shape}")
        return closest


class OnnxActivations:
    """The exported step with its activations, and what bodies of blocks save, as further outputs."""

    def __init__(self, path: Path) -> None:
        model = onnx.load(path)
        taken = {o.name for o in model.graph.output}
        kinked = [node for node in model.graph.node if node.op_type in ("Relu", "Clip", "aten_hardtanh")]
        bodies = [node for node in model.graph.node if node.op_type == "If" and node.name.endswith("_Body")]
        self.expected = any(node.op_type != "Clip" for node in kinked)  # a clip may be the clamp of the gates' price
        self.names = [name for node in kinked + bodies for name in node.output if name not in taken]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in self.names)
        other = path.with_suffix(".activations.onnx")
        onnx.save(model, other)
        self.session = session(other)
        other.unlink()

    def values(self, found: Arrays) -> list[np.ndarray[Any, Any]]:
        return [found[name] for name in self.names]


class Mismatches:
    """Signs that differ, beside the gradient in double precision.

    Attributes:
        of_zero: Those in tensors whose exact gradient is zero: all that PyTorch finds there is rounding error.
        others: The exact gradient of each other one, relative to the largest one of its tensor.
        bound: The same, relative to PyTorch's own largest rounding error in the tensor.
    """

    def __init__(self) -> None:
        self.of_zero = 0
        self.others: list[float] = []
        self.bound: list[float] = []

    def add(self, found: Arrays, single: Arrays, exact: Arrays) -> None:
        for name, gradient in single.items():
            wrong = np.sign(found[f"grad.{name}"]) != np.sign(gradient)
            peak = float(np.abs(exact[name]).max())
            if peak < 1e-3 * float(np.abs(gradient).max()):
                self.of_zero += int(wrong.sum())
            else:
                self.others += (np.abs(exact[name][wrong]) / peak).tolist()
                rounding = float(np.abs(gradient - exact[name]).max())
                self.bound += (np.abs(exact[name][wrong]) / rounding).tolist()

    def result(self) -> dict[str, Any]:
        return {
            "of_zero_gradients": self.of_zero,
            "others": len(self.others),
            "median_of_peak": float(np.median(self.others)) if self.others else 0.0,
            "largest_of_peak": max(self.others, default=0.0),
            "largest_of_rounding_error": max(self.bound, default=0.0),
        }


def gradients(model: torch.nn.Module) -> Arrays:
    """The gradient of each parameter that has one."""
    return {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}


def gradients_in_double(pair: Pair, where: Any, sides: list[np.ndarray[Any, Any]]) -> Arrays:
    """The gradients of the step from the same state and with the same sides, computed in double precision."""
    twin = copy.deepcopy(pair.t.model).double()
    for part in (twin.e2_slu, twin.e2_scales):  # which keep their types: here the whole step has to be double
        if part is not None:
            nn.Module._apply(part, lambda t: t.double() if t.is_floating_point() else t)
    with GivenSides(sides):
        pair.loss(pair.run(twin, pair.x[where].double()), pair.y[where]).backward()
    return gradients(twin)


def signs_by_other_kernels(pair: Pair, where: Any) -> Arrays:
    """PyTorch's own signs from the same state without oneDNN."""
    twin = copy.deepcopy(pair.t.model)
    with other_kernels():
        pair.loss(pair.run(twin, pair.x[where]), pair.y[where]).backward()
    return {n: np.sign(g) for n, g in gradients(twin).items()}


ZERO_GRADIENT = "e2_slu.head.bias"
"""A standardised logit does not depend on it: its gradient is nothing but rounding error."""


def differences(pair: Pair, found: Arrays) -> dict[str, float]:
    """The largest difference of parameters, of momenta, and of buffers, relative to each tensor's largest element.

    Of parameters the absolute one too.
    """
    parameters = dict(pair.t.model.named_parameters())
    worst: dict[str, float] = {}
    for name, value in training_state(pair.t, pair.opt).items():
        if f"next.{name}" not in found or not value.is_floating_point():
            continue
        kind = "parameters" if name in parameters else "momenta" if name.endswith("momentum_buffer") else "buffers"
        if name.removesuffix(".momentum_buffer") == ZERO_GRADIENT:
            kind = f"{kind} of {ZERO_GRADIENT}, absolute"
            scale = 1.0
        else:
            scale = max(float(value.abs().max()), 1e-3)
        difference = float(np.abs(found[f"next.{name}"] - value.numpy()).max())
        raise_to(worst, {kind: difference / scale})
        if kind == "parameters":
            raise_to(worst, {"parameters, absolute": difference})
    return worst


def raise_to(worst: dict[str, float], found: dict[str, float]) -> None:
    """Keep the larger value of each kind in ``worst``."""
    worst.update({kind: max(worst.get(kind, 0.0), value) for kind, value in found.items()})
