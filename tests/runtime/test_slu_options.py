"""Options of SLU: decisions per batch, linear survival, forced samples, blocks by name, projections, statistics."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import e2pass
from e2pass.errors import ConfigError
from e2pass.runtime.gates import SLUGates, linear_rates
from e2pass.transformed import Transformed
from tests.runtime.test_slu import config, residual_mlp, train


def transformed(n: int = 4, gate: str = "learned", skip: float = 0.4, **values: object) -> Transformed:
    return e2pass.transform(residual_mlp(n), torch.randn(8, 12), config=config(gate, skip, **values))


def gates(t: Transformed) -> SLUGates:
    assert t.model.e2_slu is not None
    return t.model.e2_slu


def test_a_batch_decides_as_one_and_reaches_the_target() -> None:
    t = transformed(per="batch")
    executed = train(t, 300)
    assert abs(1 - sum(executed[-150:]) / 150 - 0.4) < 0.06
    assert all(block["spread"] == 0.0 for block in t.stats()["slu"]["blocks"].values())
    shares = {round(share, 6) for share in executed}
    whole = {0.0}
    for weight in gates(t).weight.tolist():  # every share is a sum of whole blocks
        whole |= {w + weight for w in whole}
    assert all(min(abs(share - w) for w in whole) < 1e-4 for share in shares)


def test_random_gates_per_batch_skip_whole_batches() -> None:
    t = transformed(gate="random", skip=0.5, per="batch")
    for _ in range(200):
        t.model(torch.randn(4, 12))
    blocks = t.stats()["slu"]["blocks"].values()
    assert all(block["spread"] == 0.0 for block in blocks)
    assert all(abs(block["skip_ratio"] - 0.5) < 5 * (0.25 / 200) ** 0.5 for block in blocks)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=60), st.floats(0.0, 0.95))
def test_linear_rates_grow_with_depth_and_have_the_target_as_their_mean(weights: list[float], target: float) -> None:
    energy = torch.tensor(weights, dtype=torch.float64)
    energy /= energy.sum()
    rates = torch.tensor(linear_rates(energy, target), dtype=torch.float64)
    assert float((energy * rates).sum()) == pytest.approx(target, abs=1e-6)
    assert bool(((rates >= 0) & (rates <= 1)).all())
    steps = rates.diff()
    free = rates[1:] < 1 - 1e-9
    assert torch.allclose(steps[free], rates[:1].expand_as(steps[free]), atol=1e-9)


def test_linear_survival_is_the_published_rule_for_blocks_of_equal_price() -> None:
    last = 0.5  # Huang et al.: the l-th of L blocks survives with 1 - l / L (1 - last)
    rates = linear_rates(torch.full((10,), 0.1), last * 5.5 / 10)
    assert rates == pytest.approx([(1 - last) * block / 10 for block in range(1, 11)])


def test_linear_survival_skips_late_blocks_more_and_weighs_them_less_in_evaluation() -> None:
    t = transformed(2, "random", 0.3, survival="linear")
    for _ in range(20):
        t.model(torch.randn(100, 12))
    first, second = (block["skip_ratio"] for block in t.stats()["slu"]["blocks"].values())
    assert (first, second) == pytest.approx((0.2, 0.4), abs=0.055)
    assert t.report().transformed is not None
    model = t.unwrap().eval()
    x = torch.randn(5, 12)
    h = model[0](x)  # type: ignore[index]
    h = h + 0.8 * model[1].body(h)  # type: ignore[index]
    h = h + 0.6 * model[2].body(h)  # type: ignore[index]
    torch.testing.assert_close(t.model.eval()(x), model[3](h))  # type: ignore[index]


def test_random_gates_can_go_on_in_evaluation() -> None:
    t = transformed(gate="random", skip=0.5)
    t.model.eval()
    x = torch.randn(200, 12)
    with t.set_gates("random", sampled=True):
        assert not torch.equal(t.model(x), t.model(x))
        assert t.stats()["slu"]["skip_ratio_eval"] == pytest.approx(0.5, abs=0.1)
    assert torch.equal(t.model(x), t.model(x))
    with pytest.raises(ConfigError, match="only random gates can be sampled, not 'open' ones"):
        t.set_gates("open", sampled=True)


@pytest.mark.parametrize("gate", ["learned", "random"])
def test_forced_samples_enter_and_count_as_executed(gate: str) -> None:
    t = transformed(2, gate, 0.98, min_active=3)
    if gate == "learned":
        gates(t).price.fill_(4.0)
    t.model(torch.randn(8, 12)).sum().backward()
    for block in t.stats()["slu"]["blocks"].values():
        assert block["skip_ratio"] <= 5 / 8
    assert all(p.grad is not None for n, p in t.model.named_parameters() if not n.startswith("e2_"))
    t.model.eval()
    gates(t).price.fill_(4.0)
    if gate == "learned":
        t.model(torch.randn(8, 12))
        assert t.stats()["slu"]["skip_ratio_eval"] == 1.0


def test_more_forced_samples_than_a_batch_has_open_them_all() -> None:
    t = transformed(2, "random", 0.98, min_active=100)
    t.model(torch.randn(8, 12))
    assert t.stats()["slu"]["skip_ratio"] == 0.0


def test_blocks_are_left_alone_or_added_by_name() -> None:
    t = transformed(3, exclude=("2",))
    assert [(b.name, b.gated, b.reason) for b in t.blocks][1] == ("2.body", False, "excluded by the user")
    assert list(t.stats()["slu"]["blocks"]) == ["1.body", "3.body"]
    with pytest.raises(ConfigError, match=r"exclude: .* named '2\.bodi'; close .*'2\.body'"):
        transformed(3, exclude=("2.bodi",))
    with pytest.raises(ConfigError, match="include: there is no residual block or addition named 'nowhere'"):
        transformed(3, include=("nowhere",))
    with pytest.raises(ConfigError, match="both included and excluded"):
        transformed(3, include=("2.body",), exclude=("2",))


def test_projection_blocks_can_be_left_alone() -> None:
    x = torch.randn(2, 3, 8, 8)
    t = e2pass.transform(e2pass.models.resnet(8), x, config=config(projections=False))
    assert [(b.kind, b.gated) for b in t.blocks] == [("identity", True), ("projection", False), ("projection", False)]
    assert "projections=False" in t.blocks[1].reason


def test_statistics_tell_varied_gates_from_uniform_ones_and_show_the_controller() -> None:
    t = transformed()
    assert t.stats()["slu"]["blocks"]["1.body"]["spread"] is None
    train(t, 40)
    stats = t.stats()["slu"]
    assert stats["controller"]["steps"] == 40
    assert stats["controller"]["price"] == float(gates(t).price)
    assert not stats["controller"]["at_limit"]
    assert max(block["spread"] for block in stats["blocks"].values()) > 0.2
    t.reset_stats()
    with t.set_gates("open"):
        t.model(torch.randn(8, 12))
    assert all(block["spread"] == 0.0 for block in t.stats()["slu"]["blocks"].values())


def test_evaluation_with_all_gates_open_is_the_trained_network() -> None:
    t = transformed()
    train(t, 5)
    t.model.eval()
    x = torch.randn(6, 12)
    with t.set_gates("open"):
        opened: Tensor = t.model(x)
    torch.testing.assert_close(opened, t.unwrap()(x))


def test_gates_can_have_a_learning_rate_of_their_own() -> None:
    t = transformed(1)
    rates = {group["name"]: group["lr"] for group in t.param_groups(0.1, gates_lr=0.01)}
    assert rates == {"weights": 0.1, "norms and biases": 0.1, "gates": 0.01}
    with pytest.raises(ConfigError, match=r"gates_lr = 0\.0 is not allowed"):
        t.param_groups(0.1, gates_lr=0.0)


def test_the_first_single_logit_leaves_a_variance_to_divide_by() -> None:
    t = transformed(per="batch")
    images, labels = torch.randn(4, 12), torch.tensor([0, 1, 2, 3])
    torch.nn.functional.cross_entropy(t.model(images), labels).backward()
    assert all(float(gate.get_buffer("logit_var")) > 0.1 for gate in gates(t).gates)


def test_gates_that_learn_from_single_samples_tell_inputs_apart() -> None:
    torch.manual_seed(0)
    t = transformed()
    inputs = 3.0 + torch.randn(300, 12)
    for x in inputs:
        torch.nn.functional.cross_entropy(t.model(x[None]), torch.tensor([0])).backward()
    t.model.eval()
    t.model(inputs)
    blocks = t.stats()["slu"]["blocks"].values()
    assert all(block["spread_eval"] > 0.2 for block in blocks)


def test_a_batch_that_decides_as_one_forces_no_single_samples() -> None:
    with pytest.raises(ConfigError, match="min_active"):
        e2pass.SLU(per="batch", min_active=1)
