"""What ``transform`` returns: the model, the loader, the graph, and everything one wants to know about them."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn

from e2pass.blocks import ResidualBlock
from e2pass.capture.copies import copied
from e2pass.config import GateKind
from e2pass.diagnostics import Diagnostics
from e2pass.errors import ConfigError, InputError
from e2pass.optim import is_number
from e2pass.program import Program
from e2pass.report import CostReport
from e2pass.runtime.gates import SLUGates
from e2pass.runtime.mismatch import mismatch
from e2pass.runtime.module import E2Module
from e2pass.step.build import build_graph
from e2pass.step.graph import TrainingGraph, Writers
from e2pass.step.rates import STANDARD, PredictorHardware, Rates
from e2pass.step.training_step import TrainingStep, assumed_rates
from e2pass.verification import VerifyReport, verify


class GateSetting:
    """A change of all gates, in force since it was made; as a context manager it is undone on exit."""

    def __init__(self, slu: SLUGates, kind: str, sampled: bool) -> None:
        self._slu, self._before = slu, (slu.kind, slu.sampled)
        slu.kind, slu.sampled = kind, sampled

    def __enter__(self) -> GateSetting:
        return self

    def __exit__(self, *_: object) -> None:
        self._slu.kind, self._slu.sampled = self._before


class Transformed:
    """A transformed model and its training step.

    Attributes:
        model: The module to train: called, trained and saved like the original.
        loader: The loader with SMD, or None.
        blocks: Every residual block found, gated or not, with the reason.
        diagnostics: What was rewritten and what was not, each with a reason.
    """

    def __init__(self, model: E2Module, program: Program, step: TrainingStep, writers: Writers) -> None:
        self.model = model
        self.loader = program.loader
        self.blocks: list[ResidualBlock] = program.blocks["train"]
        self.diagnostics: Diagnostics = program.diagnostics
        self._program, self._step, self._writers = program, step, writers
        self._graph: TrainingGraph | None = None

    @property
    def graph(self) -> TrainingGraph:
        """The whole training step as one annotated graph; built on first use."""
        if self._graph is None:
            self._graph = build_graph(self._program, self._writers, self.report)
        return self._graph

    @property
    def _slu(self) -> SLUGates | None:
        return self.model.e2_slu

    def param_groups(
        self, lr: float, weight_decay: float = 0.0, *, gates_lr: float | None = None
    ) -> list[dict[str, Any]]:
        """Parameter groups for any ``torch.optim`` optimizer.

        Args:
            lr: Learning rate of the model's own parameters.
            weight_decay: Of its weights; norms, biases and gates have none.
            gates_lr: Learning rate of the gates, by default ``lr``; a tenth of it is a good first try.

        Returns:
            Groups ``weights`` (two dimensions or more), ``norms and biases`` and ``gates``; only the first has
            ``sign=True``, which ``e2pass.optim.SignSGD`` reads and torch's optimizers ignore.
        """
        for name, rate in (("lr", lr), ("gates_lr", lr if gates_lr is None else gates_lr)):
            if not is_number(rate) or rate <= 0:
                raise ConfigError(f"{name} = {rate!r} is not allowed; a learning rate is a positive number")
        if not is_number(weight_decay) or weight_decay < 0:
            raise ConfigError(f"weight_decay = {weight_decay!r} is not allowed; it is a number from 0")
        gates = {id(p) for p in self._slu.parameters()} if self._slu is not None else set()
        own = [p for p in self.model.parameters() if id(p) not in gates]
        weights, vectors = [p for p in own if p.dim() > 1], [p for p in own if p.dim() <= 1]
        chosen: list[tuple[str, list[nn.Parameter], float]] = [("weights", weights, weight_decay)]
        chosen.append(("norms and biases", vectors, 0.0))
        if self._slu is not None:
            chosen.append(("gates", list(self._slu.parameters()), 0.0))
        groups: list[dict[str, Any]] = [
            {"name": name, "params": params, "lr": lr, "weight_decay": decay, "sign": name == "weights"}
            for name, params, decay in chosen
        ]
        if self._slu is not None and gates_lr is not None:
            groups[-1]["lr"] = gates_lr
        return [g for g in groups if g["params"]]

    def report(self, rates: str | Rates = "assumed", *, hardware: PredictorHardware = STANDARD) -> CostReport:
        """Modelled cost of one nominal step, before and after.

        Args:
            rates: ``assumed`` (the configured targets), ``measured`` (what this run did so far), or rates of your own.
            hardware: What the board does with predicted weight gradients; matters with PSG only.
        """
        if isinstance(rates, Rates):
            return self._step.report(self._program, rates, hardware)
        if rates not in ("assumed", "measured"):
            raise ConfigError(f"rates = {rates!r} is not allowed; choose 'assumed' or 'measured', or give e2pass.Rates")
        chosen = assumed_rates(self._program) if rates == "assumed" else self._measured_rates()
        return self._step.report(self._program, chosen, hardware)

    def _measured_rates(self) -> Rates:
        assumed = assumed_rates(self._program)
        drop, skip, use = assumed.drop, dict(assumed.skip), {}
        if self.loader is not None and hasattr(self.loader, "stats") and self.loader.stats()["nominal"]:
            stats = self.loader.stats()
            drop = stats["dropped"] / stats["nominal"]
        if self._slu is not None and self._slu.kind in ("learned", "random"):
            share = self._slu.skipped_share()
            if share is None:
                raise InputError("nothing was measured yet: train at least one step, or use rates='assumed'")
            skip = dict(enumerate(share.tolist()))
        counts = self.model.e2_counts.counts
        if self._program.config.psg is not None:
            if not self._program.config.psg.stats:
                raise InputError("predictor use is not counted; give PSG(stats=True), or rates='assumed'")
            if not counts:
                raise InputError("nothing was measured yet: train at least one step, or use rates='assumed'")
            use = {name: float(c[0] / c[2]) for name, c in counts.items()}
        return Rates(drop, skip, use, assumed.default_use, assumed.batch, "measured")

    def reset_stats(self) -> None:
        """Begin to count anew what ``stats()`` reports of gates and predictors; the controller keeps its state."""
        if self._slu is not None:
            self._slu.reset_statistics()
        self.model.e2_counts.counts.clear()

    def stats(self) -> dict[str, Any]:
        """Measured so far: ``smd`` (batches), ``slu`` (skip ratios) and ``psg`` (predictor use and sign agreement).

        ``psg`` holds for each weight ``use`` (share of elements whose sign was predicted), ``agreement`` (share of
        these with the sign of the full gradient), ``bound`` (with ``PSG(bound=True)`` the paper's bound on the share
        of wrong signs among them; None for weights used in several regions) and the number of ``elements`` counted.

        ``slu`` holds the target, the skip ratios reached in training and evaluation, the controller's price, steps and
        whether the price is at its limit, and for each gated block its energy share, skip ratios and ``spread``, the
        standard deviation of its decisions between samples: 0 for a gate that treats all alike, at most 0.5.
        """
        found: dict[str, Any] = {}
        if self.loader is not None and hasattr(self.loader, "stats"):
            found["smd"] = self.loader.stats()
        if self._slu is not None:
            found["slu"] = self._slu_stats(self._slu)
        psg = self._program.config.psg
        if psg is not None and psg.stats:
            found["psg"] = {name: _selection(*c.tolist()) for name, c in self.model.e2_counts.counts.items()}
        return found

    def _slu_stats(self, slu: SLUGates) -> dict[str, Any]:
        names = [b.name for b in self.blocks if b.gated]
        columns = {
            "energy_share": slu.weight,
            "skip_ratio": slu.skipped_share(),
            "skip_ratio_eval": slu.skipped_share(evaluation=True),
            "spread": slu.spread(),
            "spread_eval": slu.spread(evaluation=True),
        }
        return {
            "target": slu.target,
            "skip_ratio": slu.skip_ratio(),
            "skip_ratio_eval": slu.skip_ratio(evaluation=True),
            "controller": {
                "price": float(slu.price),
                "steps": int(slu.steps),
                "at_limit": bool(slu.price.abs() >= slu.LIMIT),
            },
            "blocks": {
                name: {key: None if values is None else float(values[i]) for key, values in columns.items()}
                for i, name in enumerate(names)
            },
        }

    def cost_term(self) -> Tensor:
        """The differentiable compute term C of the last forward pass, for ``SLU(inject=False)``."""
        if self._slu is None:
            raise ConfigError("there are no gates, so there is no compute term; transform with slu=e2pass.SLU()")
        return self._slu.cost_term()

    def set_gates(self, kind: str, *, sampled: bool = False) -> GateSetting:
        """Make every gate ``learned``, ``open``, ``closed`` or ``random``, from now on or within a ``with`` block.

        Args:
            kind: What decides.
            sampled: Random gates go on throwing their dice in evaluation, where they otherwise run every block and
                weigh it with its survival rate.

        Raises:
            ConfigError: For another kind, for other gates than random ones that are to be sampled, or where the model
                has no gates.
        """
        if kind not in get_args(GateKind):
            raise ConfigError(f"gates cannot be {kind!r}; the kinds are {', '.join(get_args(GateKind))}")
        if self._slu is None:
            raise ConfigError("there are no gates to set; transform with slu=e2pass.SLU() a model with residual blocks")
        if sampled and kind != "random":
            raise ConfigError(f"only random gates can be sampled, not {kind!r} ones")
        return GateSetting(self._slu, kind, sampled)

    def verify(self) -> VerifyReport:
        """Run the equality proofs on the example inputs; the model's state is the same afterwards."""
        return verify(self.model, self._program)

    def unwrap(self) -> nn.Module:
        """A plain module of the original class with the trained weights."""
        return copied(self.model.source())

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs: weights, gates, controller, scales, SMD position, random states."""
        return {
            "model": self.model.state_dict(),
            "loader": self.loader.state_dict() if hasattr(self.loader, "state_dict") else None,
            "random": {"torch": torch.get_rng_state(), "python": random.getstate()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned; without a loader here the place in that of the saved run is left out.

        Raises:
            InputError: If ``state`` is not what ``state_dict`` returned, or that of another model or configuration;
                then nothing was restored.
            LoaderError: If it is that of a run with other data or another ``SMD``.
        """
        generators = self._checked(state)
        if self._loader_has_state:
            self.loader.load_state_dict(state["loader"])
        self.model.load_state_dict(state["model"])
        torch.set_rng_state(generators[0])
        random.setstate(generators[1])

    @property
    def _loader_has_state(self) -> bool:
        return hasattr(self.loader, "load_state_dict")

    def _checked(self, state: Mapping[str, Any]) -> tuple[Tensor, tuple[Any, ...]]:
        """The states of both generators, after a look whether all parts of ``state`` fit."""
        if not isinstance(state, Mapping):
            raise InputError(f"a state is what t.state_dict() returned, not a {type(state).__name__}")
        missing = {"model", "loader", "random"} - set(state)
        if missing:
            raise InputError(f"the state has no {', '.join(sorted(missing))}; give what t.state_dict() returned")
        if not isinstance(state["model"], Mapping):
            raise InputError(f"the state's 'model' is a {type(state['model']).__name__}, no state dict")
        wrong = mismatch(self.model, state["model"])
        if wrong:
            raise InputError(f"the state is not one of this model: {wrong}")
        if state["loader"] is None and self._loader_has_state:
            raise InputError(
                "the state is of a run without a loader, and cannot say where in an epoch this one goes on"
            )
        try:
            version, internal, gauss = state["random"]["python"]
            python = (version, tuple(internal), gauss)
            random.Random().setstate(python)
            torch.Generator().set_state(state["random"]["torch"])
        except (TypeError, ValueError, KeyError, RuntimeError):
            raise InputError("the state's 'random' is not the state of PyTorch's and Python's generators") from None
        return state["random"]["torch"], python


def _selection(predicted: float, agreed: float, elements: float, bound: float) -> dict[str, float | int | None]:
    return {
        "use": predicted / elements,
        "agreement": agreed / predicted if predicted else None,
        "bound": bound / predicted if predicted and not math.isnan(bound) else None,
        "elements": int(elements),
    }
