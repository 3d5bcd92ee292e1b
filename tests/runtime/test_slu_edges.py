"""SLU at its edges: odd batches, odd blocks, odd outputs. The reference is the model itself, written out by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import e2pass
from e2pass.transformed import Transformed
from tests.runtime.test_slu import config


def transformed(
    model: nn.Module, inputs: Any, gate: str = "learned", skip: float = 0.4, **values: object
) -> Transformed:
    return e2pass.transform(model, inputs, config=config(gate, skip, **values))


def mlp(width: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 16), nn.ReLU(), nn.Linear(16, width))


class Blocks(nn.Module):
    """A stem, blocks ``x + body(x)`` and a head; what it returns and how a block runs is a subclass's choice."""

    def __init__(self, *bodies: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.bodies, self.head = nn.Linear(8, 8), nn.ModuleList(bodies), nn.Linear(8, 3)

    def block(self, x: Tensor, body: nn.Module) -> Tensor:
        out: Tensor = x + body(x)
        return out

    def result(self, x: Tensor) -> Any:
        return self.head(x)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        for body in self.bodies:
            x = self.block(x, body)
        return self.result(x)


class SeveralArms(Blocks):
    """Arms that follow each other, added from the left, and two that are summed before they are added."""

    def block(self, x: Tensor, body: nn.Module) -> Tensor:
        a = body(x)
        b = body(a.relu())
        out: Tensor = x + 0.3 * a + 0.7 * b + (body(b) + body(x.relu()))
        return out


class ChainOfArms(Blocks):
    """The second arm reads the first as it is added."""

    def block(self, x: Tensor, body: nn.Module) -> Tensor:
        a = body(x)
        out: Tensor = x + a + body(a)
        return out


class LongerInTraining(Blocks):
    """The last block runs in training only."""

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        x = self.block(x, self.bodies[0])
        if self.training:
            x = self.block(x, self.bodies[1])
        return self.result(x)


class Named(Blocks):
    def result(self, x: Tensor) -> Any:
        return {"logits": self.head(x), "features": (x, [x.mean(1)])}


class InPlace(Blocks):
    """The body's first operation overwrites a copy of the fork, its last what it hands over."""

    def block(self, x: Tensor, body: nn.Module) -> Tensor:
        h = x.clone().relu_()
        out: Tensor = body(h).mul_(0.5).add_(x)
        return out


class InPlaceOnFork(Blocks):
    """The skip path sees what the body did to its input."""

    def block(self, x: Tensor, body: nn.Module) -> Tensor:
        out: Tensor = body(x.relu_()) + x
        return out


class ViewOfInput(Blocks):
    """The body hands on a view, and for one of its branches a view of its own input."""

    def block(self, x: Tensor, body: nn.Module) -> Tensor:
        rows = x.view(-1, 2, 4)
        out: Tensor = x + (body(x).view(-1, 2, 4) + 0.1 * rows).flatten(1)
        return out


def both(model: nn.Module, t: Transformed, x: Tensor) -> tuple[Any, Any]:
    torch.manual_seed(1)
    expected = copy.deepcopy(model)(x)
    torch.manual_seed(1)
    return t.model(x), expected


MODELS: dict[str, Callable[[], nn.Module]] = {
    "dict and tuple": lambda: Named(mlp(), mlp()),
    "in place": lambda: InPlace(mlp(), mlp()),
    "in place on the fork": lambda: InPlaceOnFork(mlp(), mlp()),
    "view of the input": lambda: ViewOfInput(mlp(), mlp()),
    "chain of arms": lambda: ChainOfArms(mlp(), mlp()),
    "dropout": lambda: Blocks(nn.Sequential(mlp(), nn.Dropout(0.5)), mlp()),
}


@pytest.mark.parametrize("name", MODELS)
def test_odd_blocks_and_outputs_equal_the_original_and_skip_for_real(name: str) -> None:
    model, x = MODELS[name](), torch.randn(6, 8)
    t = transformed(model, x)
    with t.set_gates("open"):
        torch.testing.assert_close(*both(model, t, x))
    t.model(x)  # gates see their logits
    assert t.model.e2_slu is not None
    t.model.e2_slu.price.zero_()
    t.model.eval()
    t.reset_stats()
    with torch.no_grad():
        torch.testing.assert_close(
            t.model.execute((x,), {}, masked=False), t.model.execute((x,), {}, masked=True), rtol=1e-4, atol=1e-5
        )
    if any(block.gated for block in t.blocks):
        skipped = t.stats()["slu"]["skip_ratio_eval"]
        assert 0 < skipped < 1
    else:
        assert name == "in place on the fork"


def test_dropout_throws_its_dice_for_the_open_samples_only() -> None:
    model, x = Blocks(nn.Sequential(mlp(), nn.Dropout(0.5))), torch.randn(64, 8)
    t = transformed(model, x, "random", skip=0.5, seed=4)
    h = model.stem(x)
    torch.manual_seed(2)
    with torch.no_grad():
        out = t.model(x)
    closed = torch.isclose(out, model.head(h)).all(1)
    assert 16 < int(closed.sum()) < 48
    torch.manual_seed(2)
    with torch.no_grad():
        entered = model.head(h[~closed] + model.bodies[0](h[~closed]))
    torch.testing.assert_close(out[~closed], entered)


def test_a_block_used_twice_has_a_gate_for_each_use_and_one_gradient() -> None:
    class Twice(Blocks):
        def forward(self, x: Tensor) -> Any:
            x = self.stem(x)
            for _ in range(2):
                x = self.block(x, self.bodies[0])
            return self.head(x)

    model, x = Twice(mlp()), torch.randn(6, 8)
    t = transformed(model, x, "open")
    assert [b.gated for b in t.blocks] == [True, True]
    assert len({b.name for b in t.blocks}) == 2
    ours, expected = both(model, t, x)
    torch.testing.assert_close(ours, expected)
    ours.sum().backward()
    model(x).sum().backward()
    twin = dict(t.model.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(twin[name].grad, parameter.grad)
    assert t.model.e2_slu is not None
    t.model.e2_slu.kind = "learned"
    t.model.zero_grad()
    t.model(x).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in t.model.parameters() if p.grad is not None)


@pytest.mark.parametrize("gate", ["learned", "random", "open", "closed"])
def test_a_batch_of_one_and_sizes_never_seen(gate: str) -> None:
    norm = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8))
    t = transformed(Blocks(norm, mlp()), torch.randn(4, 8), gate, skip=0.5)
    optimizer = torch.optim.SGD(t.param_groups(lr=0.01), momentum=0.9)
    for batch in (1, 4, 1, 7, 2, 33, 1):
        optimizer.zero_grad()
        t.model(torch.randn(batch, 8)).square().mean().backward()
        optimizer.step()
        assert all(torch.isfinite(v).all() for v in t.model.state_dict().values() if isinstance(v, Tensor))


def test_batch_norm_of_one_entering_sample_uses_running_statistics() -> None:
    norm = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8))
    t = transformed(Blocks(norm), torch.randn(4, 8), "random", skip=0.97, min_active=1)
    before = copy.deepcopy(norm[1].state_dict())
    x = torch.randn(4, 8)
    out = t.model(x)
    assert t.stats()["slu"]["skip_ratio"] == pytest.approx(0.75)
    source = t.unwrap()
    for name, value in source.get_submodule("bodies.0.1").state_dict().items():
        assert torch.equal(value, before[name]), name
    source.eval()
    entered = source(x)
    assert (torch.isclose(out, entered).all(1)).sum() == 1
    out.sum().backward()


class FunctionalNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(8))
        self.register_buffer("running_var", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.get_buffer("running_mean"), self.get_buffer("running_var")
        return functional.batch_norm(x, mean, var, momentum=0.2, training=self.training)


@pytest.mark.parametrize("kind", [lambda: nn.BatchNorm1d(8, momentum=0.2), FunctionalNorm], ids=["module", "function"])
def test_batch_norm_moves_by_the_share_of_samples_that_enter(kind: Callable[[], nn.Module]) -> None:
    norm = nn.Sequential(nn.Linear(8, 8), kind(), nn.ReLU(), nn.Linear(8, 8))
    model, x = Blocks(norm), torch.randn(16, 8)
    t = transformed(model, x, "random", skip=0.5, seed=1)
    assert t.model.e2_slu is not None
    dice = torch.Generator().set_state(t.model.e2_slu.random_state)
    entered = torch.rand(16, generator=dice) >= 0.5
    t.model(x)
    hidden = norm[0](model.stem(x)[entered])
    share = 0.2 * float(entered.float().mean())
    assert 0 < share < 0.2
    moved = t.unwrap().get_submodule("bodies.0.1")
    torch.testing.assert_close(moved.get_buffer("running_mean"), share * hidden.mean(0))
    torch.testing.assert_close(moved.get_buffer("running_var"), (1 - share) + share * hidden.var(0))


def test_nothing_open_anywhere_trains_the_rest() -> None:
    model, x = Blocks(mlp(), mlp()), torch.randn(6, 8)
    t = transformed(model, x)
    assert t.model.e2_slu is not None
    t.model.e2_slu.price.fill_(4.0)
    optimizer = torch.optim.SGD(t.param_groups(lr=0.1, weight_decay=0.1), momentum=0.9)
    before = copy.deepcopy(t.unwrap().state_dict())
    t.model(x).sum().backward()
    optimizer.step()
    assert t.stats()["slu"]["skip_ratio"] == 1.0
    for name, value in t.unwrap().state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("bodies"), name


def test_closed_from_the_start_and_a_model_without_blocks() -> None:
    model, x = Blocks(mlp()), torch.randn(6, 8)
    torch.testing.assert_close(transformed(model, x, "closed").model(x), model.head(model.stem(x)))
    plain = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    t = transformed(plain, x)
    assert [d.code for d in t.diagnostics if d.code == "E2P203"] == ["E2P203"]
    assert "slu" not in t.stats()
    torch.testing.assert_close(t.model(x), plain(x))
    with pytest.raises(e2pass.E2PassError, match="no gates to set"):
        t.set_gates("open")


def test_a_block_that_only_training_has_is_not_gated() -> None:
    model, x = LongerInTraining(mlp(), mlp()), torch.randn(6, 8)
    t = transformed(model, x, "closed")
    assert [b.gated for b in t.blocks] == [True, False]
    assert "evaluation graph does not have" in t.blocks[1].reason
    assert t.verify()
    h = model.stem(x)
    torch.testing.assert_close(t.model(x), model.head(model.block(h, model.bodies[1])))
    torch.testing.assert_close(t.model.eval()(x), model.head(h))


@pytest.mark.parametrize("kind", ["learned", "random"])
def test_sums_of_several_arms_keep_their_order(kind: str) -> None:
    model, x = SeveralArms(mlp(), mlp()), torch.randn(16, 8)
    t = transformed(model, x, kind)
    assert [(len(b.arms), b.gated, b.joins) for b in t.blocks] == [(4, True, (f"slu_merge_{i}",)) for i in (0, 1)]
    with t.set_gates("open"):
        original, ours = model(x), t.model(x)
        assert torch.equal(ours, original)
        wanted = torch.autograd.grad(original.square().sum(), list(model.parameters()))
        own = [t.model.get_parameter(name) for name, _ in model.named_parameters()]
        found = torch.autograd.grad(ours.square().sum(), own)
    assert all(map(torch.equal, found, wanted))
    found_by_masking = []
    for masked in (False, True):
        twin = copy.deepcopy(t.model)
        twin.execute((x,), {}, masked=masked).square().sum().backward()
        found_by_masking.append([p.grad for n, p in twin.named_parameters() if not n.startswith("e2_")])
    skipped = twin.e2_slu.skipped_share()  # type: ignore[union-attr]
    assert 0 < skipped.mean() < 1  # type: ignore[union-attr]
    for ours, masked_one in zip(*found_by_masking, strict=True):
        torch.testing.assert_close(ours, masked_one, rtol=1e-4, atol=1e-5)
    merges = [n for n in t.graph.nodes if n.name.startswith("merge/slu_merge_0") and n.site.phase == "forward"]
    assert len(merges) == 3
    assert all(len(n.operands) >= 2 for n in merges)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_forward_pass_within_backward_is_refused(reentrant: bool) -> None:
    t = transformed(Blocks(mlp()), torch.randn(6, 8))
    x = torch.randn(6, 8, requires_grad=True)
    out: Any = checkpoint(t.model, x, use_reentrant=reentrant)
    before = {name: value.clone() for name, value in t.model.named_buffers()}
    with pytest.raises(e2pass.E2PassError, match=r"torch\.utils\.checkpoint"):
        out.sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in t.model.named_buffers())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_around_a_model_without_gates_changes_no_gradient(reentrant: bool) -> None:
    model, x = Blocks(mlp()), torch.randn(6, 8, requires_grad=True)
    t = e2pass.transform(model, x.detach(), config="8bit")
    names, parameters = zip(*t.model.named_parameters(), strict=True)
    found = []
    for out in (t.model(x), checkpoint(t.model, x, use_reentrant=reentrant)):
        t.model.zero_grad()
        out.square().sum().backward()
        found.append([p.grad.clone() for p in parameters if p.grad is not None])
    assert len(names) == len(found[0])
    assert all(map(torch.equal, *found))
