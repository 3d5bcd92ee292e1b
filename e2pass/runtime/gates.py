"""SLU gates: pooled features -> linear -> one LSTM cell shared by all gates -> linear -> hard decision (paper, 3.2).

What differs from the published gate, and why: the logit is standardised by running statistics before it is compared
with a threshold, so a gate distinguishes inputs from its first step on instead of being open or closed for all of
them; and the threshold is the controller's price of energy times the block's share of it, so the decision maximises
benefit under an energy budget and the target skip ratio is reached and held.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

GateState = tuple[Tensor, Tensor, Tensor]
"""Decision of shape (B,) and the LSTM's hidden and cell state of shape (B, hidden)."""


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


class SLUGates(nn.Module):
    """All gates of a model, the LSTM they share, and the controller of the skip ratio.

    Attributes:
        target: Target skip ratio: share of the gated blocks' energy that is not spent.
        kind: ``learned``, ``open``, ``closed`` or ``random``.
        sampled: Random gates throw their dice in evaluation too.
        weight: Energy share of each gated block, summing to 1; buffer.
        price: The controller's price of energy, in units of the standardised logit; buffer.
    """

    GAIN = 0.2
    """Integral gain of the controller per step; a unit of price moves the open share by about 0.4."""
    LIMIT = 4.0
    """Bound of the price: beyond it every gate decides the same, and an integral would only wind up."""
    MOMENTUM = 0.05
    """Of the running statistics of each gate's logit."""
    ALPHA = 0.1
    """Weight of the compute term beside the task gradient that reaches a gate (alpha in the paper's objective)."""

    def __init__(
        self, features: Sequence[tuple[int, int]], hidden: int, kind: str, target: float, inject: bool, seed: int
    ) -> None:
        """Create one gate per ``(features, channel_dim)``."""
        super().__init__()
        self.kind, self.target, self.inject = kind, target, inject
        self.sampled = False
        self.gates = nn.ModuleList(Gate(f, hidden, dim) for f, dim in features)
        self.lstm = nn.LSTMCell(hidden, hidden)
        self.head = nn.Linear(hidden, 1)
        n = len(features)
        for name, value in {
            "weight": torch.full((n,), 1.0 / max(n, 1)),
            "price": torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(min(max(target, 1e-3), 0.999))),
            "steps": torch.zeros((), dtype=torch.int64),
            "opened": torch.zeros(n, dtype=torch.float64),
            "decided": torch.zeros(n, dtype=torch.float64),
            "opened_eval": torch.zeros(n, dtype=torch.float64),
            "decided_eval": torch.zeros(n, dtype=torch.float64),
            "random_state": torch.Generator().manual_seed(seed).get_state(),
        }.items():
            self.register_buffer(name, value)
        self.weight: Tensor
        self.price: Tensor
        self.steps: Tensor
        self.opened: Tensor
        self.decided: Tensor
        self.opened_eval: Tensor
        self.decided_eval: Tensor
        self.random_state: Tensor
        self._executed: list[tuple[int, Tensor]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_executed": []}

    def forward(self, index: int, fork: Tensor, previous: GateState | None) -> GateState:
        """Decide for each sample of ``fork`` whether block ``index`` runs.

        Args:
            index: Which gate.
            fork: Input of the block, (B, ...).
            previous: What the gate before returned, None for the first.

        Returns:
            Decision in {0, 1} of shape (B,), differentiable by a straight-through estimator, and the LSTM's state.
        """
        if self.kind != "learned":
            return self._fixed(index, fork)
        with torch.autocast(fork.device.type, enabled=False):
            return self._learned(index, fork, previous)

    def _learned(self, index: int, fork: Tensor, previous: GateState | None) -> GateState:
        gate: Gate = self.gates[index]  # type: ignore[assignment]
        features = gate.embed(gate.pool(fork))
        state = None if previous is None else (previous[1], previous[2])
        h, c = self.lstm(features, state)
        logit = self.head(h).squeeze(1)
        score = self._standardise(gate, logit) + gate.eagerness.clamp(-gate.REACH, gate.REACH)
        relative = self.weight[index] * len(self.gates)
        score = score - self.price * relative
        alpha = self.ALPHA if self.inject and self.training else 0.0
        mask: Tensor = _HardDecision.apply(score, relative * alpha)  # type: ignore[no-untyped-call]
        self._record(index, mask, score)
        return mask, h, c

    def _standardise(self, gate: Gate, logit: Tensor) -> Tensor:
        if not (self.training and torch.is_grad_enabled() and logit.numel() > 1):
            return (logit - gate.logit_mean) / (gate.logit_var + 1e-8).sqrt()
        # By the batch's own statistics, gradients included: a step that shifts or stretches all logits alike then
        # decides nothing, where running ones would lag behind it and every gate would close for all inputs.
        mean, var = logit.mean(), logit.var(correction=0)
        with torch.no_grad():
            momentum = self.MOMENTUM if int(self.steps) > 0 else 1.0
            gate.logit_mean.lerp_(mean, momentum)
            gate.logit_var.lerp_(var, momentum)
        return (logit - mean) / (var + 1e-8).sqrt()

    def _fixed(self, index: int, fork: Tensor) -> GateState:
        batch = fork.shape[0]
        empty = fork.new_zeros(())
        if self.kind == "random" and (self.training or self.sampled):
            generator = torch.Generator().set_state(self.random_state.cpu())
            mask = torch.rand(batch, generator=generator).to(fork.device) >= self.target
            self.random_state.copy_(generator.get_state())
            decision = mask.to(torch.float32)
        else:
            decision = torch.full((batch,), 0.0 if self.kind == "closed" else 1.0, device=fork.device)
        self._record(index, decision, None)
        return decision, empty, empty

    @property
    def survival(self) -> float:
        """Factor of a block's output in evaluation: stochastic depth's expected value, else 1."""
        expected = self.kind == "random" and not self.training and not self.sampled
        return 1.0 - self.target if expected else 1.0

    def _record(self, index: int, mask: Tensor, score: Tensor | None) -> None:
        opened, decided = (self.opened, self.decided) if self.training else (self.opened_eval, self.decided_eval)
        opened[index] += mask.detach().sum()
        decided[index] += mask.numel()
        if self.training and score is not None and torch.is_grad_enabled():
            self._executed.append((index, score))

    def cost_term(self) -> Tensor:
        """Differentiable expected energy share of the gated blocks in the last forward pass (C in the paper), 0-d."""
        terms = [self.weight[i] * torch.sigmoid(score).mean() for i, score in self._executed]
        return torch.stack(terms).sum() if terms else self.weight.new_zeros(())

    def begin(self) -> None:
        """A forward pass begins."""
        self._executed = []

    def settle(self) -> None:
        """A forward pass is over: move the price of energy towards the target by what was executed."""
        if self._executed:
            with torch.no_grad():
                executed = torch.stack([self.weight[i] * (s > 0).float().mean() for i, s in self._executed]).sum()
                self.price += self.GAIN * (executed - (1.0 - self.target))
                self.price.clamp_(-self.LIMIT, self.LIMIT)
                self.steps += 1

    def reset_statistics(self) -> None:
        """Forget the counts of opened and decided samples."""
        for counter in (self.opened, self.decided, self.opened_eval, self.decided_eval):
            counter.zero_()

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


class _HardDecision(torch.autograd.Function):
    """Step function forward; backward the sigmoid's slope times the task gradient, plus the compute term.

    The compute term is relative to the task gradient at this gate, so that loss scaling and accumulation change
    nothing; it also reaches samples whose block did not run and so have no task gradient.
    """

    @staticmethod
    def forward(ctx: Any, score: Tensor, alpha: Tensor) -> Tensor:
        ctx.save_for_backward(score, alpha)
        return (score > 0).to(score.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        score, alpha = ctx.saved_tensors
        p = torch.sigmoid(score)
        return (grad + alpha * grad.abs().mean()) * p * (1 - p), None
