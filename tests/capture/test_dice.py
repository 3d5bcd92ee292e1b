"""Models that throw dice in Python: LayerDrop, stochastic depth by hand, augmentation by numpy."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
import transformers
from torch import Tensor, nn

import e2pass
from e2pass.capture import Capture, capture
from e2pass.capture.generators import generators_of, states_kept, torch_states
from e2pass.diagnostics import Diagnostics
from e2pass.errors import CaptureError
from e2pass.inputs import Inputs

ROWS = torch.linspace(-1, 1, 24).reshape(6, 4)


class Depth(nn.Module):
    """Two residual blocks, skipped in training where ``throw`` says so; dropout shares the stream of random numbers."""

    def __init__(self, throw: Callable[[Any, float], Any], p: float, *, without_gradients: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 4))
            for _ in range(2)
        )
        self.throw, self.p, self.without_gradients = throw, p, without_gradients
        self.own = random.Random(0)
        self.bits = numpy.random.default_rng(0)

    def forward(self, x: Tensor) -> Tensor:
        if self.without_gradients:  # makes the graph one that only torch.export can have
            with torch.no_grad():
                x = x * 2
        for block in self.blocks:
            if self.training and self.throw(self, self.p):
                continue
            x = x + block(x)
        return x


THROWS: dict[str, Callable[[Any, float], Any]] = {
    "random": lambda model, p: random.random() < p,
    "uniform": lambda model, p: random.uniform(0, 1) < p,
    "numpy": lambda model, p: numpy.random.uniform(0, 1) < p,
    "choice": lambda model, p: random.choices([True, False], [p, 1 - p])[0],
    "torch": lambda model, p: torch.rand([]) < p,
    "item": lambda model, p: torch.rand(1).item() < p,
    "bernoulli": lambda model, p: bool(torch.bernoulli(torch.tensor(p))),
    "own random": lambda model, p: model.own.random() < p,
    "own numpy": lambda model, p: model.bits.random() < p,
}


def taken(model: nn.Module, inputs: Any = ROWS) -> Capture:
    return capture(model, Inputs.of(inputs), Diagnostics())


def assert_equal_steps(model: nn.Module, result: Capture, inputs: Tensor = ROWS) -> None:
    reference = copy.deepcopy(model).train()
    for step in range(3):
        torch.manual_seed(step)
        expected = reference(inputs)
        torch.manual_seed(step)
        torch.testing.assert_close(result.rebuild(result.train(inputs), True), expected, rtol=0, atol=0)
    for one, other in zip(model.buffers(), reference.buffers(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("p", [0.5, 0.001])
@pytest.mark.parametrize("name", [name for name in THROWS if name != "own numpy"])
def test_a_decision_by_chance_is_refused_with_its_line(name: str, p: float) -> None:
    model = Depth(THROWS[name], p)
    states = random.getstate(), torch.get_rng_state()
    with pytest.raises(
        CaptureError, match=r"Depth decides by a random number in Python at test_dice\.py:\d+,"
    ) as caught:
        taken(model)
    assert 'SLU(gate="random")' in str(caught.value)
    assert "\n" not in str(caught.value)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])


def test_a_decision_by_a_generator_of_numpy_s_new_kind_is_refused() -> None:
    with pytest.raises(CaptureError, match="decides by a random number"):
        taken(Depth(THROWS["own numpy"], 0.5))


@pytest.mark.parametrize(
    ("name", "without_gradients"),
    [*((name, False) for name in THROWS), ("numpy", True), ("torch", True), ("item", True)],
)
def test_a_throw_with_probability_zero_leaves_no_trace(name: str, without_gradients: bool) -> None:
    model = Depth(THROWS[name], 0.0, without_gradients=without_gradients)
    assert_equal_steps(model, taken(model))


def test_a_throw_with_probability_zero_leaves_the_blocks_to_be_found() -> None:
    t = e2pass.transform(Depth(THROWS["torch"], 0.0), ROWS, config="neutral")
    assert len(t.blocks) == 2
    proofs = t.verify()
    assert proofs, proofs


def test_a_number_that_is_no_decision_but_a_factor() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Any:
            return self.linear(x) * random.uniform(0.9, 1.1)

    with pytest.raises(CaptureError, match=r"decides by a random number in Python at test_dice\.py"):
        taken(Scaled())


def test_a_mask_that_is_rarely_zero_is_drawn_anew() -> None:
    class Rare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Any:
            return x + self.linear(x) * (torch.rand([]) >= 0.001).float()

    model = Rare()
    result = taken(model)
    assert any(getattr(node.target, "__name__", "") == "rand" for node in result.train.graph.nodes)
    assert_equal_steps(model, result)


def test_layerdrop_of_a_transformers_model() -> None:
    def opt(layerdrop: float) -> nn.Module:
        config = transformers.OPTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=32, vocab_size=20, use_cache=False,
            max_position_embeddings=16, word_embed_proj_dim=16, layerdrop=layerdrop,
        )  # fmt: skip
        model: nn.Module = transformers.OPTModel(config)
        return model.train()

    ids = {"input_ids": torch.arange(32).reshape(4, 8) % 20}
    remarks = Diagnostics()
    assert capture(opt(0.01), Inputs.of(ids), remarks).leaves == ("decoder",)
    (remark,) = remarks.with_code("E2P104")
    assert "decides by a random number in Python at modeling_opt.py" in remark.message
    assert taken(opt(0.0), ids).rung == "export"


def test_the_extreme_states_are_extreme() -> None:
    python, of_numpy, *_ = generators_of(nn.Linear(1, 1))
    with states_kept([python, of_numpy]), torch.random.fork_rng(devices=[]):
        for throw, bound in ((0, 0.0), (1, 1.0)):
            python.write(python.throws[throw])
            of_numpy.write(of_numpy.throws[throw])
            torch.set_rng_state(torch_states()[throw])
            drawn = [random.random(), random.uniform(0, 1), float(numpy.random.rand()), float(torch.rand([]))]
            assert drawn == pytest.approx([bound] * 4, abs=1e-5)
            assert all(0 < number < 1 for number in drawn)


class Opaque(nn.Module):
    """Cannot be traced into, since Python looks at values, and decides by chance."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        kept = not self.training or random.random() < 0.5
        out: Tensor = self.linear(x) * float(x.detach().abs().max() > 0) * float(kept)
        return out


def test_a_module_that_stays_opaque_goes_on_throwing_its_dice() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 6), Opaque(), nn.Linear(6, 2)), torch.randn(4, 6)
    t = e2pass.transform(model, x, config="neutral")
    assert [d.node for d in t.diagnostics.with_code("E2P102")] == ["1"]
    (remark,) = t.diagnostics.with_code("E2P104")
    assert "test_dice.py" in remark.message
    found = []
    for run in (model.train(), t.model.train()):
        random.seed(0)
        found.append(torch.stack([run(x) for _ in range(12)]))
    assert torch.equal(*found)
    assert len({tuple(row.flatten().tolist()) for row in found[1]}) == 2
