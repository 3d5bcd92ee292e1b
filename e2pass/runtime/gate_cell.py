"""The network of a gate, embedding, LSTM cell and head, as one node of autograd.

It computes on a few numbers per sample, so that calling operators is what takes the time: as modules it is some thirty
operators forward and twice as many backward, each with a node of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

Inputs = tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""What ``GateCell`` takes, in its order."""


class GateCell(torch.autograd.Function):
    """``head(h')``, ``h'`` and ``c'`` with ``h', c' = lstm_cell(embed(pooled), (h, c))``, one column a sample.

    Shapes: pooled (n, features); h and c (hidden, n), or None before the first gate; embed (hidden, features); w_ih and
    w_hh (4 hidden, hidden), rows in the order input, forget, cell, output of ``nn.LSTMCell``; bias (4 hidden), the sum
    of the cell's two; head_w (1, hidden); head_b (1). The results have shapes (n, 1), (hidden, n), (hidden, n). What is
    pooled gets no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        pooled: Tensor,
        h: Tensor | None,
        c: Tensor | None,
        embed: Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        bias: Tensor,
        head_w: Tensor,
        head_b: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the logit, h' and c'."""
        inputs: Inputs = (pooled, h, c, embed, w_ih, w_hh, bias, head_w, head_b)
        (logit, h_new, c_new), saved = _compute(inputs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, h_new, *saved)
        return logit, h_new, c_new

    @staticmethod
    def backward(ctx: Any, d_logit: Tensor | None, d_h: Tensor | None, d_c: Tensor | None) -> Any:
        """Backpropagate through the cell; each gradient has the shape of its input."""
        with torch.autocast(ctx.saved_tensors[0].device.type, enabled=False):  # as in forward
            if torch.is_grad_enabled():  # a second derivative is wanted: leave the first one to autograd
                return _differentiable(ctx.saved_tensors[:9], (d_logit, d_h, d_c))
            return _gradients(ctx.saved_tensors, (d_logit, d_h, d_c))


def _gradients(kept: tuple[Tensor, ...], grads: tuple[Tensor | None, ...]) -> Any:
    inputs, (h_new, *saved), (d_logit, d_h, d_c) = kept[:9], kept[9:], grads
    pooled, h, c, _, w_ih, w_hh, _, head_w, head_b = inputs
    embedded, gates, new, squashed = saved
    i, f, _, o = gates.chunk(4)
    d_row = head_b.new_zeros(1, len(pooled)) if d_logit is None else d_logit.reshape(1, -1)
    d_h = head_w.t() * d_row if d_h is None else torch.addmm(d_h, head_w.t(), d_row)
    d_c_new = aten.tanh_backward(d_h * o, squashed)
    if d_c is not None:
        d_c_new = d_c_new + d_c
    d_gates = [
        aten.sigmoid_backward(d_c_new * new, i),
        torch.zeros_like(d_c_new) if c is None else aten.sigmoid_backward(d_c_new * c, f),
        aten.tanh_backward(d_c_new * i, new),
        aten.sigmoid_backward(d_h * squashed, o),
    ]
    d = torch.cat(d_gates)
    return (
        None,
        None if h is None else w_hh.t() @ d,
        None if c is None else d_c_new * f,
        (w_ih.t() @ d) @ pooled,
        d @ embedded.t(),
        torch.zeros_like(w_hh) if h is None else d @ h.t(),
        d.sum(1),
        d_row @ h_new.t(),
        d_row.sum(1),
    )


def _compute(inputs: Inputs) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
    """Return the results, and what backward needs."""
    pooled, h, c, embed, w_ih, w_hh, bias, head_w, head_b = inputs
    embedded = embed @ pooled.t()
    z = torch.addmm(bias.unsqueeze(1), w_ih, embedded)
    if h is not None:
        z = torch.addmm(z, w_hh, h)
    gates = torch.sigmoid(z)
    i, f, _, o = gates.chunk(4)
    new = torch.tanh(z.chunk(4)[2])
    c_new = i * new if c is None else torch.addcmul(f * c, i, new)
    squashed = torch.tanh(c_new)
    h_new = o * squashed
    logit = torch.addmm(head_b.unsqueeze(1), head_w, h_new).reshape(-1, 1)
    return (logit, h_new, c_new), (embedded, gates, new, squashed)


def _differentiable(inputs: Inputs, grads: tuple[Tensor | None, ...]) -> Any:
    results, _ = _compute(inputs)
    pairs = [(r, g) for r, g in zip(results, grads, strict=True) if g is not None]
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    outputs, given = [r for r, _ in pairs], [g for _, g in pairs]
    found = iter(torch.autograd.grad(outputs, wanted, given, create_graph=True, allow_unused=True))
    return tuple(next(found) if x is not None and x.requires_grad else None for x in inputs)
