"""One minimal graph per rule: what is a residual block, and what only looks like one."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from e2pass.passes.residual import search
from tests.passes.residual.graphs import Fn, Fn2, body, conv, mlp, traced, without

IMAGE = torch.randn(2, 4, 8, 8)
TOKENS = torch.randn(2, 5, 8)
VECTOR = torch.randn(2, 8)


def _drop_path(m: Any, x: torch.Tensor) -> Any:
    out = m.f(x)
    return x + out.div(0.8) * out.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(0.8)


def _squeeze_excite(m: Any, x: torch.Tensor) -> Any:
    out = m.f(x)
    return x + out * torch.sigmoid(m.up(F.relu(m.down(out.mean((2, 3), keepdim=True)))))


def _attention(m: Any, x: torch.Tensor, mask: torch.Tensor | None = None) -> Any:
    q, k, v = m.qkv(m.norm(x)).chunk(3, dim=-1)
    scores = q @ k.transpose(-2, -1)
    scores = scores if mask is None else scores + mask
    return m.out(scores.softmax(-1) @ v)


def _transformer(m: Any, x: torch.Tensor) -> Any:
    x = x + _attention(m, x)
    return x + m.mlp(m.norm2(x))


def _parallel(m: Any, x: torch.Tensor) -> Any:
    h = m.norm(x)
    return m.out(F.gelu(m.qkv(h))) + m.mlp(h) + x


def _preactivation(m: Any, x: torch.Tensor) -> Any:
    h = F.relu(m.norm(x))
    return m.skip(h) + m.f(h)


def _ghost(m: Any, x: torch.Tensor) -> Any:
    h = m.stem(x)
    return m.pw(F.relu(m.dw(h))) + m.g(F.relu(m.f(h)))


def _pooled_skip(m: Any, x: torch.Tensor) -> Any:
    down = F.max_pool2d(x, 2)
    return torch.cat((down + m.f(x), down), 1)


def _squeezed_skip(m: Any, x: torch.Tensor) -> Any:
    h = m.stem(x)
    squeezed = h.view(h.size(0), 2, 2, h.size(2), h.size(3)).sum(2)
    return torch.cat((squeezed + m.f(h), m.g(h)), 1)


def _activated_projection(m: Any, x: torch.Tensor) -> Any:
    h = m.stem(x)
    return torch.cat((m.skip(F.relu(m.norm(h))) + m.f(h), m.g(h)), 1)


def _dead(m: Any, x: torch.Tensor) -> Any:
    pooled, _ = F.max_pool2d(m.f(x), 3, 1, 1, return_indices=True)
    return x + torch.sigmoid(pooled)


TRANSFORMER: dict[str, nn.Module] = {"qkv": nn.Linear(8, 24), "out": nn.Linear(8, 8), "norm": nn.LayerNorm(8)}

POSITIVE: dict[str, tuple[nn.Module, tuple[torch.Tensor, ...], list[tuple[str, str, str]]]] = {
    # model, inputs, and for each block its name, its kind and the name of its fork
    "identity": (Fn(lambda m, x: F.relu(x + m.f(x)), f=body(4)), (IMAGE,), [("f", "identity", "x")]),
    "identity, body first": (Fn(lambda m, x: m.f(x) + x, f=body(4)), (IMAGE,), [("f", "identity", "x")]),
    "projection": (
        Fn(lambda m, x: m.f(x) + m.skip(x), f=body(4, 6, 2), skip=nn.Sequential(conv(4, 6, 1, 2), nn.BatchNorm2d(6))),
        (IMAGE,),
        [("f", "projection", "x")],
    ),
    "projection with average pool": (
        Fn(lambda m, x: m.skip(F.avg_pool2d(x, 2)) + m.f(x), f=body(4, 6, 2), skip=conv(4, 6, 1)),
        (IMAGE,),
        [("f", "projection", "x")],
    ),
    "max pool as skip, read elsewhere too": (
        Fn(_pooled_skip, f=body(4, 4, 2)),
        (IMAGE,),
        [("f", "projection", "x")],
    ),
    "sums of channels as skip, the fork read elsewhere too": (
        Fn(_squeezed_skip, stem=conv(4), f=body(4, 2), g=conv(4, 2)),
        (IMAGE,),
        [("f", "projection", "stem")],
    ),
    "padded skip": (
        Fn(lambda m, x: F.pad(F.avg_pool2d(x, 2), (0, 0, 0, 0, 0, 2)) + m.f(x), f=body(4, 6, 2)),
        (IMAGE,),
        [("f", "projection", "x")],
    ),
    "projection after a shared activation": (
        Fn(_preactivation, norm=nn.BatchNorm2d(4), f=body(4, 6), skip=conv(4, 6, 1)),
        (IMAGE,),
        [("f", "projection", "relu")],
    ),
    "pre-activation": (
        Fn(lambda m, x: x + m.c(F.relu(m.n(x))), c=conv(4), n=nn.BatchNorm2d(4)),
        (IMAGE,),
        [("c", "identity", "x")],
    ),
    "nn.Identity as skip": (
        Fn(lambda m, x: m.skip(x) + m.f(x), f=body(4), skip=nn.Identity()),
        (IMAGE,),
        [("f", "identity", "x")],
    ),
    "squeeze-excite": (
        Fn(_squeeze_excite, f=body(4), down=conv(4, 2, 1), up=conv(2, 4, 1)),
        (IMAGE,),
        [("add", "identity", "x")],
    ),
    "drop path": (Fn(_drop_path, f=body(4)), (IMAGE,), [("f", "identity", "x")]),
    "layer scale": (
        Fn(lambda m, x: x + m.gamma * m.f(x), f=mlp(8), gamma=nn.Parameter(torch.ones(8))),
        (TOKENS,),
        [("f", "identity", "x")],
    ),
    "dropout": (
        Fn(lambda m, x: x + m.d(m.f(x)), f=mlp(8), d=nn.Dropout(0.1)),
        (VECTOR,),
        [("f", "identity", "x")],
    ),
    "transformer": (
        Fn(_transformer, **TRANSFORMER, mlp=mlp(8), norm2=nn.LayerNorm(8)),
        (TOKENS,),
        [("add", "identity", "x"), ("mlp", "identity", "add")],
    ),
    "parallel attention and MLP": (
        Fn(_parallel, qkv=nn.Linear(8, 8), out=nn.Linear(8, 8), norm=nn.LayerNorm(8), mlp=mlp(8)),
        (TOKENS,),
        [("add_1", "identity", "x")],
    ),
    "masked attention": (
        Fn2(lambda m, x, y: x + _attention(m, x, y), **TRANSFORMER),
        (TOKENS, torch.zeros(2, 1, 5)),
        [("add_1", "identity", "x")],
    ),
    "pool inside a body with unused indices": (Fn(_dead, f=body(4)), (IMAGE,), [("f", "identity", "x")]),
    "in-place addition": (Fn(lambda m, x: m.f(x).add_(x), f=body(4)), (IMAGE,), [("f", "identity", "x")]),
    "reshaped tokens": (
        Fn(lambda m, x: x + m.f(x.flatten(1)).view(x.shape), f=mlp(40)),
        (TOKENS,),
        [("f", "identity", "x")],
    ),
}


@pytest.mark.parametrize("case", POSITIVE)
def test_is_a_residual_block(case: str) -> None:
    model, inputs, expected = POSITIVE[case]
    graph_module = traced(model, *inputs)
    found = search(graph_module)
    assert [(b.name, b.kind, b.fork) for b in found.blocks] == expected
    assert all(b.gated and not b.reason for b in found.blocks)
    for block in found.blocks:
        without(graph_module, block)(*inputs)


NOT_GATED: dict[str, tuple[nn.Module, tuple[torch.Tensor, ...], str, str]] = {
    # model, inputs, kind and why it is left alone
    "skip path that is not linear": (
        Fn(_ghost, stem=conv(4), f=conv(4), g=nn.Sequential(conv(4), nn.ReLU(), conv(4)), dw=conv(4), pw=conv(4, 4, 1)),
        (IMAGE,),
        "nonlinear",
        "skip path is not linear",
    ),
    "projection with an activation of its own, the fork read elsewhere too": (
        Fn(_activated_projection, stem=conv(4), norm=nn.BatchNorm2d(4), skip=conv(4, 4, 1), f=body(4), g=conv(4)),
        (IMAGE,),
        "nonlinear",
        "skip path is not linear",
    ),
    "rows that are not samples": (
        Fn(lambda m, x: (lambda h: h + m.f(h))(x.reshape(-1, 8)), f=mlp(8)),
        (TOKENS,),
        "identity",
        r"\(5\*batch, 8\) are not the samples",
    ),
    "scaled body": (
        Fn(lambda m, x: torch.add(x, m.f(x), alpha=0.5), f=mlp(8)),
        (VECTOR,),
        "identity",
        "alpha=0.5",
    ),
}


@pytest.mark.parametrize("case", NOT_GATED)
def test_is_a_residual_block_that_is_left_alone(case: str) -> None:
    model, inputs, kind, reason = NOT_GATED[case]
    (block,) = search(traced(model, *inputs)).blocks
    assert (block.kind, block.gated) == (kind, False)
    assert re.search(reason, block.reason)


def _linknet(m: Any, x: torch.Tensor) -> Any:
    return x + F.interpolate(m.f(F.max_pool2d(x, 2)), scale_factor=2)


def _pyramid(m: Any, x: torch.Tensor) -> Any:
    fine = m.lateral(x)
    return fine + F.interpolate(F.relu(m.f(F.relu(m.down(x)))), scale_factor=2)


def _gelu_tanh(m: Any, x: torch.Tensor) -> Any:
    x = m.f(x)
    return 0.5 * x * (1.0 + torch.tanh(0.79 * (x + 0.044715 * torch.pow(x, 3.0))))


def _rotary(m: Any, x: torch.Tensor) -> Any:
    q = m.f(x)
    turned = torch.cat((-q[..., 4:], q[..., :4]), dim=-1)
    return q * m.cos + turned * m.sin


def _dense(m: Any, x: torch.Tensor) -> Any:
    h = m.f(x)
    return torch.cat((x + F.relu(h), h), 1)


def _state(m: Any, x: torch.Tensor) -> Any:
    h = F.relu(m.f(x))
    return x + m.g(h), h


def _one_of_many(m: Any, x: torch.Tensor) -> Any:
    h = m.stem(x)
    return torch.cat((F.avg_pool2d(h, 3, 1, 1) + m.f(h), m.g(h)), 1)


def _mean_of_many(m: Any, x: torch.Tensor) -> Any:
    h = m.stem(x)
    return torch.cat((h.mean((2, 3), keepdim=True).expand(h.shape) + m.f(h), m.g(h)), 1)


def _activated_branch(m: Any, x: torch.Tensor) -> Any:
    h = m.stem(x)
    return torch.cat((F.relu(m.a(h)) + m.f(h), m.g(h)), 1)


def _fuse(m: Any, x: torch.Tensor) -> Any:
    a, b = F.relu(m.a(F.relu(x))), F.relu(m.b(F.relu(x)))
    return m.a2(a) + m.b2(b)


def _response_norm(m: Any, x: torch.Tensor) -> Any:
    energy = x.norm(dim=1, keepdim=True)
    return m.gamma * (x * energy / (energy.mean(-1, keepdim=True) + 1e-6)) + m.beta + x


REJECTED: dict[str, tuple[nn.Module, tuple[torch.Tensor, ...], str]] = {
    "concatenation": (Fn(lambda m, x: torch.cat((x, m.f(x)), 1), f=body(4)), (IMAGE,), ""),
    "chain": (Fn(lambda m, x: m.f(x), f=body(4)), (IMAGE,), ""),
    "added number": (Fn(lambda m, x: m.f(x) + 1e-5, f=body(4)), (IMAGE,), ""),
    "scale merge with identity": (Fn(_linknet, f=body(4)), (IMAGE,), "enlarging a smaller map"),
    "nested scale merges, the outer one at full size": (
        Fn(lambda m, x: x + m.up(_linknet(m, m.down(x))), f=body(4), down=body(4), up=conv(4)),
        (IMAGE,),
        "enlarging a smaller map",
    ),
    "scale merge with lateral convolution": (
        Fn(_pyramid, lateral=conv(4, 4, 1), f=conv(4), down=conv(4, stride=2)),
        (IMAGE,),
        "enlarging a smaller map",
    ),
    "position embedding": (
        Fn(lambda m, x: m.f(m.f(x) + m.pos), f=nn.Linear(8, 8), pos=nn.Parameter(torch.zeros(1, 5, 8))),
        (TOKENS,),
        "does not depend on the input: a position embedding",
    ),
    "position embedding of the same shape": (
        Fn(lambda m, x: m.f(x) + m.pos.expand(x.shape), f=nn.Linear(8, 8), pos=nn.Parameter(torch.zeros(1, 5, 8))),
        (TOKENS,),
        "does not depend on the input: a position embedding",
    ),
    "bias": (
        Fn(lambda m, x: m.f(x) + m.bias, f=nn.Linear(8, 8), bias=nn.Parameter(torch.zeros(8))),
        (TOKENS,),
        "does not depend on the input: a bias",
    ),
    "constant mask": (
        Fn(lambda m, x: (m.f(x) @ x.transpose(1, 2) + m.mask).softmax(-1), f=nn.Linear(8, 8), mask=torch.zeros(5, 5)),
        (TOKENS,),
        "does not depend on the input: a position table, mask",
    ),
    "attention mask": (
        Fn2(lambda m, x, y: (m.f(x) @ x.transpose(1, 2) + y).softmax(-1), f=nn.Linear(8, 8)),
        (TOKENS, torch.zeros(2, 1, 5)),
        "different shapes",
    ),
    "two inputs": (
        Fn2(lambda m, x, y: F.relu(m.f(x)) + F.relu(m.f(y)), f=nn.Linear(8, 8)),
        (VECTOR, torch.randn(2, 8)),
        "come from different inputs",
    ),
    "two embeddings of one index": (
        Fn(lambda m, x: m.a(x) + m.b(x), a=nn.Embedding(7, 8), b=nn.Embedding(7, 8)),
        (torch.zeros(2, 5, dtype=torch.long),),
        "no feature map with the rank",
    ),
    "channel attention": (
        Fn(
            lambda m, x: x * torch.sigmoid(m.f(x.mean((2, 3))) + m.f(x.amax((2, 3))))[..., None, None],
            f=nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 4)),
        ),
        (IMAGE,),
        "no feature map with the rank",
    ),
    "tanh approximation": (Fn(_gelu_tanh, f=nn.Linear(8, 8)), (TOKENS,), "no weights"),
    "rotary embedding": (
        Fn(_rotary, f=nn.Linear(8, 8), cos=torch.ones(5, 8), sin=torch.ones(5, 8)),
        (TOKENS,),
        "one of several merges|all paths to the sum are linear",
    ),
    "activation added to itself": (Fn(lambda m, x: (lambda h: h + h)(m.f(x)), f=body(4)), (IMAGE,), "the same value"),
    "parallel linear branches": (
        Fn(
            lambda m, x: F.relu(m.a(x) + m.b(x)),
            a=nn.Sequential(conv(4), nn.BatchNorm2d(4)),
            b=nn.Sequential(conv(4, 4, 1), nn.BatchNorm2d(4)),
        ),
        (IMAGE,),
        "all paths to the sum are linear",
    ),
    "linear body": (
        Fn(lambda m, x: F.relu(x + m.f(x)), f=nn.Sequential(conv(4), nn.BatchNorm2d(4))),
        (IMAGE,),
        "the body is linear",
    ),
    "max pool and linear body": (
        Fn(lambda m, x: F.relu(x + m.f(x)), f=nn.Sequential(nn.MaxPool2d(3, 1, 1), conv(4))),
        (IMAGE,),
        "the body is linear",
    ),
    "global response norm": (
        Fn(_response_norm, gamma=nn.Parameter(torch.zeros(8)), beta=nn.Parameter(torch.zeros(8))),
        (TOKENS,),
        "nothing to save",
    ),
    "body that is also concatenated": (Fn(_dense, f=conv(4)), (IMAGE,), "another exit"),
    "body that is also returned": (Fn(_state, f=conv(4), g=conv(4)), (IMAGE,), "output of the model"),
    "pooled skip path in a cell": (
        Fn(
            lambda m, x: (lambda h: torch.cat((m.skip(F.max_pool2d(h, 3, 1, 1)) + m.f(h), m.g(h)), 1))(m.stem(x)),
            **{"stem": conv(4), "f": body(4), "g": conv(4), "skip": conv(4, 4, 1)},
        ),
        (IMAGE,),
        "one of several merges",
    ),
    "mean of the map beside other branches": (
        Fn(_mean_of_many, stem=conv(4), f=body(4), g=conv(4)),
        (IMAGE,),
        "one of several merges",
    ),
    "branch that ends in an activation beside others": (
        Fn(_activated_branch, stem=conv(4), a=conv(4, 4, 1), f=body(4), g=conv(4)),
        (IMAGE,),
        "one of several merges",
    ),
    "one of many merges of a cell": (
        Fn(_one_of_many, stem=conv(4), f=body(4), g=conv(4)),
        (IMAGE,),
        "one of several merges",
    ),
    "fusion of two branches": (
        Fn(
            _fuse,
            **{n: nn.Sequential(conv(4), nn.ReLU(), conv(4), nn.ReLU(), conv(4)) for n in ("a", "b", "a2", "b2")},
        ),
        (IMAGE,),
        "no operand is a skip path",
    ),
    "body that overwrites its fork": (
        Fn(lambda m, x: (lambda h: h + m.f(F.relu_(h)))(m.stem(x)), stem=conv(4), f=conv(4)),
        (IMAGE,),
        "works in place on stem",
    ),
    "in-place module on the fork": (
        Fn(lambda m, x: (lambda h: h + m.f(m.act(h)))(m.stem(x)), stem=conv(4), f=conv(4), act=nn.ReLU(inplace=True)),
        (IMAGE,),
        "works in place on stem",
    ),
    "scaled skip": (
        Fn(lambda m, x: torch.add(m.f(x), x, alpha=2), f=mlp(8)),
        (VECTOR,),
        "multiplies its skip path by 2",
    ),
    "sum of integers": (Fn(lambda m, x: m.f(x + x.clone()), f=nn.Embedding(9, 4)), (torch.ones(2, 3).long(),), "int64"),
    "mixed types": (
        Fn(lambda m, x: x.double() + m.f(x), f=mlp(8)),
        (VECTOR,),
        "different types",
    ),
}


@pytest.mark.parametrize("case", REJECTED)
def test_is_no_residual_block(case: str) -> None:
    model, inputs, reason = REJECTED[case]
    found = search(traced(model, *inputs))
    assert found.blocks == []
    if not reason:
        assert found.rejected == []
        return
    assert any(re.search(reason, r.reason) for r in found.rejected), found.rejected
