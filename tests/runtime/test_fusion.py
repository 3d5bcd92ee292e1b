"""Compiled islands of a half: what is in them, and that nothing else changes."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from e2pass import PSG, Bits
from e2pass.runtime import ops
from e2pass.runtime.fusion import fuse, islands
from e2pass.runtime.module import SelectionCounts
from e2pass.runtime.region import CompiledRegion, _consuming
from tests.lowering.layers import region


class Block(nn.Module):
    """Two convolutions with norms, a skip connection and a head: masks, sums of gradients, saved norm inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.first(x)).relu()
        y = (self.norm2(self.second(y)) + y).relu()
        out: Tensor = self.head(y.mean((2, 3)))
        return out


WIDE = Bits(x=16, w=8, grad=16, w_scale="channel")


@pytest.fixture(scope="module")
def block() -> CompiledRegion:
    torch.manual_seed(0)
    return region(Block(), (4, 4, 6, 6), Bits(), PSG(stats=True, bound=True))


def run(one: CompiledRegion, tensors: list[Tensor], gy: Tensor) -> tuple[list[Tensor | None], SelectionCounts]:
    counts = SelectionCounts()
    for tensor in tensors:
        tensor.grad = None
    outputs, side = one(tensors, [], counts.add)
    outputs[0].backward(gy)
    return [*outputs, *side, *(t.grad for t in tensors)], counts


@pytest.mark.parametrize("bits", [Bits(), WIDE], ids=["8/8/16", "16/8/16"])
def test_a_fused_region_computes_what_the_plain_one_does(bits: Bits) -> None:
    """Through a backend that takes no minute to compile."""
    torch.manual_seed(0)
    model = Block()
    plain, fused = (region(model, (4, 4, 6, 6), bits, PSG(stats=True)) for _ in range(2))
    fused.forward = fuse(fused.halves.forward, backend="aot_eager")
    fused.backward = _consuming(fuse(fused.halves.backward, backend="aot_eager"))
    named: dict[str, Any] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for batch in (4, 3, 1, 2):
        x, gy = torch.randn(batch, 4, 6, 6, requires_grad=True), torch.randn(batch, 3)
        tensors = [x if kind == "input" else named[key.split(".", 1)[-1]] for kind, key in plain.halves.forward_inputs]
        (expected, counts), (found, fused_counts) = run(plain, tensors, gy), run(fused, tensors, gy)
        torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0)
        torch.testing.assert_close(fused_counts.counts, counts.counts, equal_nan=True)


def test_products_norms_masks_and_saved_16_bit_codes_stay_as_they_are(block: CompiledRegion) -> None:
    for half in (block.halves.forward, block.halves.backward):
        inside = {n for island in islands(half.graph) for n in island}
        assert inside
        targets = {n.target for n in inside}
        assert not targets & {torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default}
        assert not any("batch_norm" in str(t) for t in targets)
        for node in inside:
            values = node.meta["val"] if isinstance(node.meta["val"], tuple) else (node.meta["val"],)
            assert all(v.dtype != torch.bool for v in values)
            if any(v.dtype == torch.int16 for v in values):  # held in 32 bits within one loop, never in memory
                assert all(user in inside for user in node.users)


def test_a_predictor_reads_operands_of_one_island(block: CompiledRegion) -> None:
    """Quantizing a gradient, its most significant bits and both decodings take one loop after the peak is known."""
    of = {n: i for i, island in enumerate(islands(block.halves.backward.graph)) for n in island}
    quantized = [n for n in of if n.target is torch.ops.e2pass.quantize.default]
    assert len(quantized) == 3
    for node in quantized:
        together = [n.target for n in of if of[n] == of[node]]
        assert torch.ops.e2pass.msb.default in together
        assert together.count(torch.ops.e2pass.dequantize.default) >= 2


def test_layers_keep_their_order(block: CompiledRegion) -> None:
    """Backward finishes a layer before the next one, and so lets go of what forward saved as early as before."""
    product, norm = torch.ops.aten.convolution_backward.default, torch.ops.aten.native_batch_norm_backward.default

    def layers(half: fx.GraphModule) -> list[set[str]]:
        """The products after each norm."""
        found: list[set[str]] = []
        for node in half.graph.nodes:
            if node.target is norm:
                found.append(set())
            elif node.target is product:
                found[-1].add(node.name)
        return found

    half = block.halves.backward
    assert [len(products) for products in layers(half)] == [5, 5]  # dX, dW, the predicted dW, two for the bound
    assert layers(fuse(half, backend="eager")) == layers(half)


def test_equal_islands_are_compiled_once(block: CompiledRegion) -> None:
    once, again = (fuse(block.halves.backward, backend="eager") for _ in range(2))
    modules = [{id(m) for name, m in half.named_children() if name.startswith("island")} for half in (once, again)]
    assert modules[0] == modules[1]
    assert len(modules[0]) < len(islands(block.halves.backward.graph))  # the two convolutions share


def test_codes_are_wide_within_an_island_only() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(5, 3)
    pair = graph.call_function(torch.ops.e2pass.quantize.default, (x, 8))
    pair.meta["val"] = torch.ops.e2pass.quantize(x.meta["val"], 8)
    for i in range(2):
        item = graph.call_function(operator.getitem, (pair, i))
        item.meta["val"] = pair.meta["val"][i]
    graph.output(tuple(list(graph.nodes)[-2:]))
    half = fx.GraphModule({}, graph)
    value = torch.randn(5, 3)
    codes, scale = fuse(half, backend="aot_eager")(value)
    assert codes.dtype == torch.int8
    expected = ops.quantize(value, 8)
    assert torch.equal(codes, expected[0])
    assert torch.equal(scale, expected[1])
