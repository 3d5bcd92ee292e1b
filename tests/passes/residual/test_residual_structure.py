"""What the search says about a block: its nodes, arms, joins, side inputs, name, features and nesting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from e2pass.blocks import BlockSearch, ResidualBlock
from e2pass.errors import PassError
from e2pass.passes.residual import search
from tests.passes.residual.graphs import Fn, Fn2, body, conv, exported, mlp, traced, without

IMAGE = torch.randn(2, 4, 8, 8)
TOKENS = torch.randn(2, 5, 8)


def _only(found: BlockSearch) -> ResidualBlock:
    (block,) = found.blocks
    return block


class Basic(nn.Module):
    """A basic block whose export updates two counters of batches."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(channels), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = conv(channels), nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(x + self.bn2(self.conv2(out)))


def test_counters_of_batch_norms_belong_to_the_body() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), Basic(4))
    graph_module = exported(model, IMAGE)
    block = _only(search(graph_module))
    updates = [n for n in graph_module.graph.nodes if n.op == "call_function" and "add_" in str(n.target)]
    assert len(updates) == 3
    assert [n.name in block.nodes for n in updates] == [False, True, True]
    left = without(graph_module, block)
    assert not [n for n in left.graph.nodes if n.op == "get_attr" and str(n.target).startswith("1.")]


def test_block_that_runs_twice_is_two_blocks_and_its_counters_stay_outside() -> None:
    """The second update of a counter reads the first, so that neither body could do without the other."""
    graph_module = exported(Fn(lambda m, x: m.f(F.relu(m.f(x))), f=Basic(4)), IMAGE)
    first, second = search(graph_module).blocks
    assert first.name != second.name
    for block in (first, second):
        left = without(graph_module, block)
        assert len([n for n in left.graph.nodes if "add_." in str(n.target)]) == 4
        left(IMAGE)


def test_random_masks_and_sizes_of_the_body_belong_to_it() -> None:
    def drop_path(m: Any, x: torch.Tensor) -> Any:
        out = m.f(x)
        keep = torch.rand(out.shape[0], 1, 1, 1) < 0.8
        return x + out * keep

    graph_module = exported(Fn(drop_path, f=body(4)), IMAGE)
    block = _only(search(graph_module))
    assert block.side_inputs == ()
    assert {n.name for n in graph_module.graph.nodes} - set(block.nodes) == {"x", block.join, "output"}


def test_body_nodes_are_in_execution_order_and_nothing_else_reads_them() -> None:
    graph_module = traced(nn.Sequential(Basic(4), Basic(4), nn.Flatten()), IMAGE)
    order = [n.name for n in graph_module.graph.nodes]
    for block in search(graph_module).blocks:
        assert list(block.nodes) == sorted(block.nodes, key=order.index)
        inside = {*block.nodes, *block.joins}
        for node in graph_module.graph.nodes:
            if node.name in block.nodes:
                assert {user.name for user in node.users} <= inside


def test_mask_and_shared_sizes_are_side_inputs() -> None:
    def attend(m: Any, x: torch.Tensor, mask: torch.Tensor) -> Any:
        rows, length, _ = x.size()
        x = m.stem(x)
        for f in (m.f, m.g):
            h = f(x)
            scores = (h @ h.transpose(1, 2)).view(rows, length, length) + mask
            x = x + scores.softmax(-1) @ h
        return x

    members: dict[str, Any] = {
        "stem": nn.Linear(8, 8),
        "f": nn.Linear(8, 8),
        "g": nn.Linear(8, 8),
        "table": torch.zeros(5, 5),
    }
    graph_module = traced(Fn2(attend, **members), TOKENS, torch.zeros(2, 1, 5))
    first, second = search(graph_module).blocks
    assert (first.name, second.name) == ("f", "g")
    values = {n.name: n.meta["val"] for n in graph_module.graph.nodes}
    for block in (first, second):
        kinds = [type(values[name]) for name in block.side_inputs]
        assert kinds.count(int) == 1  # the length, known
        assert kinds.count(torch.SymInt) == 1  # the batch
        assert "y" in block.side_inputs


def test_arms_and_joins_follow_the_tree() -> None:
    def parallel(m: Any, x: torch.Tensor) -> Any:
        return (m.f(x) + x) + m.g(x)

    block = _only(search(traced(Fn(parallel, f=mlp(8), g=mlp(8)), TOKENS)))
    assert (block.fork, block.shortcut) == ("x", "x")
    assert block.arms == ("f_2", "g_2")
    assert block.joins == ("add", "add_1")
    assert block.join == "add_1"


def test_an_arm_that_the_next_arm_reads_is_no_fork() -> None:
    def chain(m: Any, x: torch.Tensor) -> Any:
        h = m.f(x)
        return x + h + m.g(h)

    block = _only(search(traced(Fn(chain, f=mlp(8), g=mlp(8)), TOKENS)))
    assert (block.fork, block.shortcut) == ("x", "x")
    assert block.arms == ("f_2", "g_2")


def test_blocks_in_a_row_with_a_longer_skip_stay_blocks_of_their_own() -> None:
    def row(m: Any, x: torch.Tensor) -> Any:
        h = x + m.f(x)
        return h + m.g(h) + x

    blocks = search(traced(Fn(row, f=mlp(8), g=mlp(8)), TOKENS)).blocks
    assert [b.name for b in blocks if b.gated] == ["f", "g"]


def test_the_real_part_of_a_value_depends_on_the_input() -> None:
    block = _only(search(traced(Fn(lambda m, x: x + m.f(torch.complex(x, x).real), f=mlp(8)), TOKENS)))
    assert (block.fork, block.arms) == ("x", ("f_2",))


def test_projection_is_the_shortcut_and_not_in_the_body() -> None:
    model = Fn(
        lambda m, x: m.skip(x) + m.f(x), f=body(4, 6, 2), skip=nn.Sequential(conv(4, 6, 1, 2), nn.BatchNorm2d(6))
    )
    block = _only(search(traced(model, IMAGE)))
    assert (block.kind, block.fork, block.shortcut, block.arms) == ("projection", "x", "skip_1", ("f_4",))
    assert block.nodes == tuple(f"f_{i}" for i in range(5))


def test_part_of_a_sum_is_a_block_where_the_whole_is_not() -> None:
    """The last unit of a stage, with a longer skip added to its output."""

    def stage(m: Any, x: torch.Tensor) -> Any:
        h = m.stem(x)
        return (h + m.f(h)) + m.skip(x)

    model = Fn(stage, stem=nn.Sequential(conv(4), nn.ReLU()), f=body(4), skip=conv(4, 4, 1))
    inner, outer = sorted(search(traced(model, IMAGE)).blocks, key=lambda b: len(b.nodes))
    assert (inner.name, inner.gated, inner.join, inner.nested_in) == ("f", True, "add", outer.name)
    assert (outer.gated, outer.join, outer.kind) == (False, "add_1", "projection")
    assert "contains the block f" in outer.reason


def test_sum_longer_than_any_tree_is_still_searched() -> None:
    def long_sum(m: Any, x: torch.Tensor) -> Any:
        total = x
        for f in m.fs:
            total = total + f(x)
        return total

    found = search(traced(Fn(long_sum, fs=nn.ModuleList(mlp(8) for _ in range(40))), TOKENS))
    joins = [join for block in found.blocks for join in block.joins]
    assert "add" in joins
    assert len(joins) == len(set(joins))


def test_nested_blocks_gate_the_innermost() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.tail = Basic(4), conv(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = x + self.tail(self.inner(x))
            return out

    blocks = {b.name: b for b in search(traced(nn.Sequential(Outer(), Outer()), IMAGE)).blocks}
    assert {name: b.gated for name, b in blocks.items()} == {"0.inner": True, "0": False, "1.inner": True, "1": False}
    assert blocks["0.inner"].nested_in == "0"
    assert blocks["0"].nested_in is None
    assert set(blocks["0.inner"].nodes) < set(blocks["0"].nodes)


def test_blocks_come_in_the_order_of_their_forks() -> None:
    def branches(m: Any, x: torch.Tensor) -> Any:
        a, b = F.relu(m.a(x)), F.relu(m.b(x))
        fb = m.fb(b)
        ga = a + m.fa(a)
        return torch.cat((ga, b + fb), 1)

    model = Fn(branches, a=conv(4), b=conv(4), fa=body(4), fb=body(4))
    assert [b.name for b in search(traced(model, IMAGE)).blocks] == ["fa", "fb"]


def test_shared_block_has_two_names() -> None:
    model = Fn(lambda m, x: m.f(m.f(x)), f=Basic(4))
    assert [b.name for b in search(traced(model, IMAGE)).blocks] == ["f", "f#2"]


def _channels_last(m: Any, x: torch.Tensor) -> Any:
    return x + m.f(m.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


def _length_last(m: Any, x: torch.Tensor) -> Any:
    return x + m.f(x.transpose(1, 2)).transpose(1, 2)


CHANNELS: dict[str, tuple[nn.Module, torch.Tensor, int]] = {
    "convolution": (Fn(lambda m, x: x + m.f(x), f=body(8)), torch.randn(2, 8, 8, 8), 1),
    "one-dimensional convolution": (
        Fn(lambda m, x: x + F.relu(m.f(x)), f=nn.Conv1d(8, 8, 3, padding=1)),
        torch.randn(2, 8, 8),
        1,
    ),
    "batch norm first": (
        Fn(lambda m, x: x + m.c(F.relu(m.n(x))), c=conv(8), n=nn.BatchNorm2d(8)),
        torch.randn(2, 8, 8, 8),
        1,
    ),
    "group norm first": (Fn(lambda m, x: x + m.c(m.n(x)), c=conv(8), n=nn.GroupNorm(2, 8)), torch.randn(2, 8, 8, 8), 1),
    "linear": (Fn(lambda m, x: x + m.f(x), f=mlp(8)), torch.randn(2, 8, 8), 2),
    "layer norm over the last of four": (
        Fn(lambda m, x: x + m.f(m.norm(x)), f=mlp(8), norm=nn.LayerNorm(8)),
        torch.randn(2, 8, 8, 8),
        3,
    ),
    "channels moved last, all sizes equal": (
        Fn(_channels_last, f=mlp(8), norm=nn.LayerNorm(8)),
        torch.randn(2, 8, 8, 8),
        1,
    ),
    "mixing over the length, all sizes equal": (Fn(_length_last, f=mlp(8)), torch.randn(2, 8, 8), 1),
    "vector": (Fn(lambda m, x: x + m.f(x), f=mlp(8)), torch.randn(2, 8), 1),
}


@pytest.mark.parametrize("case", CHANNELS)
def test_channel_dim(case: str) -> None:
    model, x, expected = CHANNELS[case]
    assert _only(search(traced(model, x))).channel_dim == expected


def test_static_batch_is_known_by_its_size() -> None:
    inside = Fn(lambda m, x: (lambda h: h + m.f(h))(x.reshape(-1, 8)), f=mlp(8))
    assert _only(search(traced(Basic(4), IMAGE, symbolic=False))).gated
    assert not _only(search(traced(inside, TOKENS, symbolic=False))).gated


def test_graph_without_additions_has_no_blocks() -> None:
    assert search(traced(mlp(8), TOKENS)) == BlockSearch([], [])


def test_graph_without_shapes_is_refused() -> None:
    with pytest.raises(PassError, match="needs shapes"):
        search(fx.symbolic_trace(Basic(4)))
