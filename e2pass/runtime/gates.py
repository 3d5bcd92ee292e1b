"""SLU gates: pooled features -> linear -> one LSTM cell shared by all gates -> linear -> hard decision (paper, 3.2).

What differs from the published gate, and why: the logit is standardised by running statistics before it is compared
with a threshold, so a gate distinguishes inputs from its first step on instead of being open or closed for all of
them; and the threshold is the controller's price of energy times the block's share of it, so the decision maximises
benefit under an energy budget and the target skip ratio is reached and held.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from e2pass.runtime.decision import HardDecision, WithZeroGradients, processes_wait
from e2pass.runtime.gate_cell import GateCell
from e2pass.runtime.own_types import OwnTypes

_COUNTERS = ("opened", "decided", "varied", "opened_eval", "decided_eval")

GateState = tuple[Tensor, Tensor, Tensor]
"""Decision of shape (B,) and the LSTM's hidden and cell state of shape (hidden, B)."""


class Gate(nn.Module):
    """One block's own part of the gate: which features it looks at, and how eager it is to open.

    Attributes:
        embed: Linear map from the block input's features to the LSTM's input, without bias.
        eagerness: Learned offset of the standardised logit, kept within ±``REACH``.
    """

    REACH = 1.5
    """Keeps a gate from becoming the same for all inputs: at the bound some 7 % of them still decide otherwise."""

    def __init__(self, features: int, hidden: int, channel_dim: int) -> None:
        super().__init__()
        self.channel_dim = channel_dim
        self.embed = nn.Linear(features, hidden, bias=False)
        self.eagerness = nn.Parameter(torch.zeros(()))
        self.register_buffer("logit_mean", torch.zeros(()))
        self.register_buffer("logit_var", torch.ones(()))
        self.logit_mean: Tensor
        self.logit_var: Tensor

    def pool(self, x: Tensor) -> Tensor:
        """Average (B, ..., C, ...) over everything but samples and features, detached: gates do not steer features.

        The result has the gate's own type, which is float32 whatever the model computes in.
        """
        dims = [d for d in range(1, x.dim()) if d != self.channel_dim]
        x = x.detach()
        return (x.mean(dims) if dims else x).to(self.embed.weight.dtype)


class _Pass:
    """What the gates share in one forward pass.

    Attributes:
        offsets: What each gate adds to its standardised logit: its eagerness less the price of its block; 0-d each.
        costs: Weight of the compute term in each gate's backward; 0-d each.
        weights: Of the LSTM cell and the head, as ``GateCell`` takes them.
        step: Steps that the controller has done before; 0 in evaluation.
        learning: Whether statistics and the price move.
        decisions: Gate, decision (B,) and score, (B,) or (1,) or None, in the order they were made.
        generator: State of the random gates' dice.
    """

    def __init__(self, slu: SLUGates) -> None:
        if slu.kind == "learned":
            eagerness = torch.stack([gate.eagerness for gate in slu.gates])  # type: ignore[misc]
            relative = slu.weight * len(slu.gates)
            self.offsets = (eagerness.clamp(-Gate.REACH, Gate.REACH) - slu.price * relative).unbind()
            self.costs = (relative * (slu.ALPHA if slu.inject and slu.training else 0.0)).unbind()
            lstm, head = slu.lstm, slu.head
            self.weights = (lstm.weight_ih, lstm.weight_hh, lstm.bias_ih + lstm.bias_hh, head.weight, head.bias)
        self.learning = slu.training and (torch.is_grad_enabled() or slu.logits is not None)
        self.decisions: list[tuple[int, Tensor, Tensor | None]] = []
        self.generator: torch.Generator | None = None
        self._slu = slu

    @cached_property
    def step(self) -> int:
        """Looked at only where it is needed: a trace for export cannot look at values."""
        return int(self._slu.steps) if self._slu.training else 0


class SLUGates(OwnTypes):
    """All gates of a model, the LSTM they share, and the controller of the skip ratio.

    Attributes:
        target: Target skip ratio: share of the gated blocks' energy that is not spent.
        kind: ``learned``, ``open``, ``closed`` or ``random``.
        per: ``sample``, or ``batch`` where all samples of a batch share one decision.
        survival: How the skip rate of random gates runs with depth: ``constant`` or ``linear``.
        min_active: Samples that enter each block in training at the least.
        sampled: Random gates throw their dice in evaluation too.
        logits: Where each gate's logits (n,) are to be kept, while they are; None else.
        weight: Energy share of each gated block, summing to 1; buffer.
        price: The controller's price of energy, in units of the standardised logit; buffer.
    """

    GAIN = 0.2
    """Integral gain of the controller per step; a unit of price moves the open share by about 0.4."""
    LIMIT = 4.0
    """Bound of the price: beyond it every gate decides the same, and an integral would only wind up."""
    MOMENTUM = 0.1
    """Of the running statistics of each gate's logit: as batch norm's, whose statistics the features rest on."""
    MOMENTUM_OF_ONE = 0.05
    """The same where a step has a single logit, and training itself decides by them."""
    EPS = 1e-8
    """Added to the variance of a logit before it is divided by."""
    ALPHA = 0.1
    """Weight of the compute term beside the task gradient that reaches a gate (alpha in the paper's objective)."""

    def __init__(
        self,
        features: Sequence[tuple[int, int]],
        hidden: int,
        kind: str,
        target: float,
        *,
        inject: bool = True,
        seed: int = 0,
        per: str = "sample",
        survival: str = "constant",
        min_active: int = 0,
    ) -> None:
        """Create one gate per ``(features, channel_dim)``."""
        super().__init__()
        self.kind, self.target, self.inject = kind, target, inject
        self.per, self.survival, self.min_active = per, survival, min_active
        self.sampled = False
        self.gates = nn.ModuleList(Gate(f, hidden, dim) for f, dim in features)
        self.lstm = nn.LSTMCell(hidden, hidden)
        self.head = nn.Linear(hidden, 1)
        n = len(features)
        for name, value in {
            "weight": torch.full((n,), 1.0 / max(n, 1)),
            "price": torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(min(max(target, 1e-3), 0.999))),
            "steps": torch.zeros((), dtype=torch.int64),
            "random_state": torch.Generator().manual_seed(seed).get_state(),
        }.items():
            self.register_buffer(name, value)
        for name in _COUNTERS:
            self.register_buffer(name, torch.zeros(n, dtype=torch.float64))
        self.weight: Tensor
        self.price: Tensor
        self.steps: Tensor
        self.random_state: Tensor
        self.opened: Tensor
        self.decided: Tensor
        self.varied: Tensor
        self.opened_eval: Tensor
        self.decided_eval: Tensor
        self.logits: list[list[Tensor]] | None = None
        self._pass: _Pass | None = None
        self._scores: list[tuple[int, Tensor]] = []
        self._rates: tuple[int, list[float]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "logits": None, "_pass": None, "_scores": []}

    def forward(self, index: int, fork: Tensor, previous: GateState | None) -> GateState:
        """Decide for each sample of ``fork`` whether block ``index`` runs.

        Args:
            index: Which gate.
            fork: Input of the block, (B, ...).
            previous: What the gate before returned, None for the first.

        Returns:
            Decision in {0, 1} of shape (B,), differentiable by a straight-through estimator, and the LSTM's state.
        """
        if self.kind != "learned" or self.target == 0.0:
            return self._fixed(index, fork)
        with torch.autocast(fork.device.type, enabled=False):
            return self._learned(index, fork, previous)

    def _learned(self, index: int, fork: Tensor, previous: GateState | None) -> GateState:
        gate: Gate = self.gates[index]  # type: ignore[assignment]
        pooled = gate.pool(fork)
        if self.per == "batch" and not (self.training and len(fork) == 0):  # nothing has no mean to learn from
            pooled = pooled.mean(0, keepdim=True)
        current = self._pass or _Pass(self)
        h, c = (None, None) if previous is None else previous[1:]
        logit, h, c = GateCell.apply(pooled, h, c, gate.embed.weight, *current.weights)  # type: ignore[no-untyped-call]
        if self.logits is not None:
            self.logits[index].append(logit.detach().squeeze(1))
        standardised = self._standardise(gate, logit, current)
        mask, score = HardDecision.apply(  # type: ignore[no-untyped-call]
            standardised, current.offsets[index], current.costs[index]
        )
        if self.per == "batch":
            mask = mask.expand(fork.shape[0])
        mask = self._enough(mask, score)
        self._record(index, mask, score)
        return mask, h, c

    def _standardise(self, gate: Gate, logit: Tensor, current: _Pass) -> Tensor:
        """Bring logits (n, 1) to mean 0 and variance 1: a batch norm without weights."""
        mean, var = gate.logit_mean.view(1).clone(), gate.logit_var.view(1).clone()
        if not current.learning or len(logit) == 0:
            return functional.batch_norm(logit, mean, var, eps=self.EPS)
        if len(logit) > 1:
            # By the batch's own statistics, gradients included: a step that shifts or stretches all logits alike then
            # decides nothing, where running ones would lag behind it and every gate would close for all inputs.
            momentum = self.MOMENTUM if current.step > 0 else 1.0
            out = functional.batch_norm(logit, mean, var, training=True, momentum=momentum, eps=self.EPS)
            keep_finite(gate, mean, var)
            return out
        # One logit has no spread of its own, so running statistics have to do.
        with torch.no_grad():
            momentum = max(self.MOMENTUM_OF_ONE, 1.0 / (current.step + 2))  # one whole would leave a variance of 0
            away = (logit - mean).view(1)
            var.add_(momentum * away.square()).mul_(1.0 - momentum)
            mean.add_(momentum * away)
        keep_finite(gate, mean, var)
        return functional.batch_norm(logit, mean, var, eps=self.EPS)

    def _fixed(self, index: int, fork: Tensor) -> GateState:
        batch = fork.shape[0]
        empty = fork.new_zeros(())
        if self.kind == "random" and (self.training or self.sampled):
            decision = self._thrown(index, batch).to(fork.device)
        else:
            decision = torch.full((batch,), 0.0 if self.kind == "closed" else 1.0, device=fork.device)
        self._record(index, decision, None)
        if index == 0 and self.training and torch.is_grad_enabled() and processes_wait():
            decision = WithZeroGradients.apply(decision, *self.parameters())  # type: ignore[no-untyped-call]
        return decision, empty, empty

    def _thrown(self, index: int, batch: int) -> Tensor:
        """Decisions by dice that are the gates' own, so that a run is the same whatever else draws numbers."""
        current = self._pass
        generator = (current.generator if current else None) or torch.Generator().set_state(self.random_state.cpu())
        draws = torch.rand(1 if self.per == "batch" else batch, generator=generator)
        if current is None:
            self.random_state.copy_(generator.get_state())
        else:
            current.generator = generator
        decision = (draws >= self.skip_rate(index)).to(torch.float32).expand(batch)
        return self._enough(decision, draws)

    def _enough(self, mask: Tensor, score: Tensor) -> Tensor:
        """Open the closed samples with the highest scores until ``min_active`` are open."""
        wanted = min(self.min_active, len(mask)) if self.training else 0
        if wanted == 0:
            return mask
        closed = mask.detach() == 0
        missing = wanted - int((~closed).sum())
        if missing <= 0:
            return mask
        nearest = score.detach().expand(len(mask)).masked_fill(~closed, -torch.inf).topk(missing).indices
        return mask + torch.zeros_like(mask).index_fill(0, nearest, 1.0)

    def skip_rate(self, index: int) -> float:
        """Probability that a random gate closes; linear in the depth or the target for all."""
        if self.survival == "constant":
            return self.target
        version = self.weight._version
        if self._rates is None or self._rates[0] != version:
            self._rates = version, linear_rates(self.weight, self.target)
        return self._rates[1][index]

    def factor(self, index: int) -> float:
        """Factor of a block's output: its survival rate where random gates are evaluated by expectation, else 1."""
        expected = self.kind == "random" and not self.training and not self.sampled
        return 1.0 - self.skip_rate(index) if expected else 1.0

    def _record(self, index: int, mask: Tensor, score: Tensor | None) -> None:
        if self._pass is not None:
            self._pass.decisions.append((index, mask.detach(), None if score is None else score.detach()))
            if score is not None and self._pass.learning:
                self._scores.append((index, score))

    def cost_term(self) -> Tensor:
        """Differentiable expected energy share of the gated blocks in the last forward pass (C in the paper), 0-d."""
        terms = [self.weight[i] * torch.sigmoid(score).mean() for i, score in self._scores]
        return torch.stack(terms).sum() if terms else self.weight.new_zeros(())

    def begin(self) -> None:
        """A forward pass begins: do once what all gates need."""
        self._pass = _Pass(self)
        self._scores = []

    @torch.no_grad()
    def settle(self) -> None:
        """A forward pass is over: count its decisions, and move the price of energy towards the target by them.

        A decision on a score that is no number closed its block, and counts nowhere; a step with one moves no price.
        """
        current, self._pass = self._pass, None
        if current is None or not current.decisions or len(current.decisions[0][1]) == 0:
            return
        if current.generator is not None:
            self.random_state.copy_(current.generator.get_state())
        indices, masks, scores = zip(*current.decisions, strict=True)
        index = torch.tensor(indices, device=self.weight.device)
        open_ = torch.stack(masks).to(torch.float64)
        known = torch.ones_like(open_)
        if scores[0] is not None:
            known = torch.stack(scores).isfinite().to(torch.float64).expand_as(open_)
        share = (open_ * known).sum(1) / known.sum(1).clamp(min=1.0)
        self._count(index, share, known.sum(1))
        if current.learning and scores[0] is not None:
            sound = known.min()
            executed = (self.weight[index] * share).sum()
            self.price += sound * self.GAIN * (executed - (1.0 - self.target))
            self.price.clamp_(-self.LIMIT, self.LIMIT)
            self.steps += sound.to(torch.int64)

    def _count(self, index: Tensor, share: Tensor, samples: Tensor) -> None:
        opened, decided = (self.opened, self.decided) if self.training else (self.opened_eval, self.decided_eval)
        opened.index_add_(0, index, samples * share)
        decided.index_add_(0, index, samples)
        if self.training:
            self.varied.index_add_(0, index, samples * share * (1.0 - share))

    def reset_statistics(self) -> None:
        """Forget the counts of opened and decided samples."""
        for name in _COUNTERS:
            self.get_buffer(name).zero_()

    def skip_ratio(self, evaluation: bool = False) -> float | None:
        """Energy-weighted share of the gated blocks that was skipped, None before anything was decided."""
        per_block = self.skipped_share(evaluation)
        return None if per_block is None else float((self.weight.cpu().double() * per_block).sum())

    def skipped_share(self, evaluation: bool = False) -> Tensor | None:
        """Share of decisions that closed each gate, (gates,), None before anything was decided."""
        opened, decided = (self.opened_eval, self.decided_eval) if evaluation else (self.opened, self.decided)
        if len(self.gates) == 0 or bool((decided == 0).any()):
            return None
        return (1.0 - opened / decided).cpu()

    def spread(self, evaluation: bool = False) -> Tensor | None:
        """How much decisions differ between samples, (gates,): their standard deviation, at most 0.5.

        In training within the same batch, averaged over batches, since between batches the gates learn; in evaluation
        over all samples. None before anything was decided.
        """
        skipped = self.skipped_share(evaluation)
        if skipped is None:
            return None
        variance = skipped * (1.0 - skipped) if evaluation else (self.varied / self.decided).cpu()
        return variance.clamp(min=0.0).sqrt()


@torch.no_grad()
def keep_finite(gate: Gate, mean: Tensor, var: Tensor) -> None:
    """Store new statistics (1,) of a gate's logit; where they are no numbers, those from before stay.

    A batch with a NaN spoils its own step; kept in an average it would spoil every evaluation after it.
    """
    sound = (mean + var).isfinite()
    gate.logit_mean.copy_(torch.where(sound, mean, gate.logit_mean).view(()))
    gate.logit_var.copy_(torch.where(sound, var, gate.logit_var).view(()))


def linear_rates(weight: Tensor, target: float) -> list[float]:
    """Skip rates that grow linearly with depth, at most to 1, and whose mean weighted by ``weight`` is ``target``.

    The linear decay of survival of Huang et al. 2016 ("Deep networks with stochastic depth", section 3); the published
    rule, which fixes the rate of the last block, is the special case of equal weights and a low target.
    """
    energy = weight.detach().cpu().double()
    depth = torch.arange(1, len(energy) + 1, dtype=torch.float64) / len(energy)
    low, high = 0.0, float(len(energy))
    for _ in range(60):
        slope = (low + high) / 2
        reached = float((energy * (slope * depth).clamp(max=1.0)).sum())
        low, high = (slope, high) if reached < target * float(energy.sum()) else (low, slope)
    return (high * depth).clamp(max=1.0).tolist()
