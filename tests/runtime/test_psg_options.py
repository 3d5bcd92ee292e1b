"""Each option of PSG and Bits: what it promises, on small models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import e2pass
from e2pass import PSG, Bits, Config
from e2pass.runtime import ops
from e2pass.runtime.module import SelectionCounts
from e2pass.transformed import Transformed
from tests.lowering.layers import region
from tests.zoo import PooledHead, conv_bn


class Tagger(nn.Module):
    """Embedding, LayerNorm and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, 8), nn.LayerNorm(8)
        self.hidden, self.head = nn.Linear(8, 12), nn.Linear(12, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        y: Tensor = self.head(functional.gelu(self.hidden(self.norm(self.embed(tokens)))))
        return y


TOKENS = torch.arange(24).reshape(4, 6) % 11


def transformed(config: Config, model: nn.Module | None = None, inputs: Tensor = TOKENS) -> Transformed:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return e2pass.transform(model or Tagger(), inputs, config=config)


def only(psg: PSG | None = None, bits: Bits | None = None) -> Config:
    return Config(smd=None, slu=None, psg=psg, bits=bits or Bits())


def backward(t: Transformed, inputs: Tensor = TOKENS) -> dict[str, Tensor]:
    t.model.zero_grad()
    t.model(inputs).square().sum().backward()
    return {n: p.grad for n, p in t.model.named_parameters() if p.grad is not None}


def ternary(gradient: Tensor) -> bool:
    return len(gradient.abs()[gradient != 0].unique()) == 1


def test_excluded_weights_keep_their_full_gradient() -> None:
    t = transformed(only(PSG(exclude=("head.*",))))
    found, eight = backward(t), backward(transformed(only()))
    assert ternary(found["hidden.weight"])
    torch.testing.assert_close(found["head.weight"], eight["head.weight"])
    (why,) = [d.message for d in t.diagnostics.with_code("E2P411") if d.node == "head.weight"]
    assert "PSG.exclude" in why


@pytest.mark.parametrize("config", [only(PSG(exclude=("haed.*",))), only(bits=Bits(exclude=("haed.*",)))])
def test_a_pattern_that_fits_nothing_is_an_error(config: Config) -> None:
    with pytest.raises(e2pass.E2PassError, match=r"exclude: 'haed\.\*' fits no parameter"):
        transformed(config)


def test_layers_excluded_from_quantization_are_exact() -> None:
    t = transformed(only(PSG(), Bits(exclude=("*.weight",))))
    exact = transformed(Config(smd=None, slu=None, psg=None, bits=None))
    found, wanted = backward(t), backward(exact)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4)  # norm inputs are saved in 16 bits


def test_embeddings_norms_and_biases_are_signed_on_request() -> None:
    t = transformed(only(PSG(also=("embeddings", "norms", "biases"))))
    found, eight = backward(t), backward(transformed(only()))
    for name in ("embed.weight", "norm.weight", "norm.bias", "hidden.bias", "head.bias"):
        assert ternary(found[name]), name
        assert torch.equal(found[name].sign(), eight[name].sign()), name
        assert found[name].abs().max().item() == pytest.approx(eight[name].abs().mean().item(), rel=1e-4)
    assert {d.node for d in t.diagnostics.with_code("E2P412")} >= {"embed.weight", "norm.weight", "head.bias"}
    few = backward(transformed(only(PSG(also=("biases",)))))
    assert ternary(few["head.bias"])
    assert not ternary(few["norm.bias"])


def test_warmup_is_full_precision_and_survives_a_restart() -> None:
    config = only(PSG(warmup=2))
    t = transformed(config)
    exact = backward(transformed(Config(smd=None, slu=None, psg=None, bits=None)))
    first = backward(t)
    for name, gradient in first.items():
        torch.testing.assert_close(gradient, exact[name])
    again = transformed(config)
    again.load_state_dict(t.state_dict())
    for one in (t, again):
        assert not ternary(backward(one)["head.weight"])  # step 2
        assert ternary(backward(one)["head.weight"])


def test_stochastic_rounding_is_unbiased_and_its_own() -> None:
    x = torch.linspace(-1, 1, 41)
    state = torch.get_rng_state()
    draws = [ops.quantize_stochastic(x, 4, None, torch.tensor(step), stream=7) for step in range(2000)]
    assert torch.equal(torch.get_rng_state(), state)
    mean = torch.stack([codes * scale for codes, scale in draws]).mean(0)
    deviation = draws[0][1] / 2 / 2000**0.5  # of the mean, at most
    assert (mean - x).abs().max() < 5 * deviation
    again, _ = ops.quantize_stochastic(x, 4, None, torch.tensor(3), stream=7)
    other, _ = ops.quantize_stochastic(x, 4, None, torch.tensor(3), stream=8)
    assert torch.equal(again, draws[3][0])
    assert not torch.equal(other, draws[3][0])


def test_stochastic_rounding_resumes_and_evaluation_has_none() -> None:
    config = only(bits=Bits(x=4, rounding="stochastic"))
    t = transformed(config)
    backward(t)
    again = transformed(config)
    again.load_state_dict(t.state_dict())
    a, b = t.model(TOKENS), again.model(TOKENS)
    assert torch.equal(a, b)
    assert not torch.equal(t.model(TOKENS), a)
    t.model.eval()
    assert torch.equal(t.model(TOKENS), t.model(TOKENS))


@pytest.mark.parametrize(("bits", "keep"), [(8, 4), (8, 7), (16, 10), (16, 15), (5, 5)])
@pytest.mark.parametrize("mode", ["round", "floor", "truncate"])
def test_most_significant_bits_of_every_code(bits: int, keep: int, mode: str) -> None:
    limit = 2 ** (bits - 1) - 1
    codes = torch.arange(-limit, limit + 1)
    unit = 2 ** (bits - keep)
    high, scale = ops.msb(codes.to(ops.code_dtype(bits)), torch.tensor(0.5), bits, keep, mode)
    exact = {
        "floor": [c // unit for c in codes.tolist()],
        "truncate": [int(c / unit) for c in codes.tolist()],
        "round": [min((2 * c + unit) // (2 * unit) if unit > 1 else c, 2 ** (keep - 1) - 1) for c in codes.tolist()],
    }[mode]
    assert high.tolist() == exact
    assert scale.item() == 0.5 * unit


def test_statistics_are_off_by_default_and_start_anew() -> None:
    t = transformed(only(PSG()))
    backward(t)
    assert "psg" not in t.stats()
    with pytest.raises(e2pass.E2PassError, match=r"PSG\(stats=True\)"):
        t.report(rates="measured")
    counted = transformed(only(PSG(stats=True)))
    backward(counted)
    first = counted.stats()["psg"]["head.weight"]
    assert first["elements"] == 60
    assert first["bound"] is None
    with pytest.raises(e2pass.E2PassError, match="needs stats=True"):
        PSG(bound=True)
    backward(counted)
    assert counted.stats()["psg"]["head.weight"]["elements"] == 120
    counted.reset_stats()
    assert counted.stats()["psg"] == {}
    for name, gradient in backward(counted).items():  # counting changes nothing
        torch.testing.assert_close(gradient, backward(t)[name])


def test_the_share_of_wrong_signs_keeps_the_papers_bound() -> None:
    torch.manual_seed(0)
    shares, bounds = [], []
    for layer, shape in ((nn.Conv2d(4, 6, 3, bias=False), (16, 4, 8, 8)), (nn.Linear(20, 10, bias=False), (64, 20))):
        weight = layer.weight
        counts = SelectionCounts()
        found = region(layer, shape, Bits(), PSG(stats=True, bound=True))
        for _ in range(5):
            (out,), _ = found([weight, torch.randn(shape)], [], counts.add)
            out.backward(torch.randn(out.shape))
        predicted, agreed, elements, bound = counts.counts["layer.weight"].tolist()
        assert 0 < agreed <= predicted < elements
        shares.append(1 - agreed / predicted)
        bounds.append(bound / predicted)
    assert all(0 < share <= bound < 0.5 for share, bound in zip(shares, bounds, strict=True))


def test_the_bound_is_the_variance_of_uniform_noise() -> None:
    """The paper's E1 and E2 written out for a linear layer: sums over the samples of gy^2 and of x^2."""
    torch.manual_seed(0)
    layer, x, gy = nn.Linear(6, 4, bias=False), torch.randn(9, 6), torch.randn(9, 4)
    counts = SelectionCounts()
    (out,), _ = region(layer, (9, 6), Bits(), PSG(stats=True, bound=True, beta=0.0))([layer.weight, x], [], counts.add)
    out.backward(gy)
    step_x, step_gy = x.abs().max().double() / 127 * 2**4, gy.abs().max().double() / 32767 * 2**6
    x_, gy_ = (t.double() for t in (torch.round(x / x.abs().max() * 127) / 127 * x.abs().max(), gy))
    gw = gy_.T @ x_
    p = (step_x**2 * gy_.square().sum(0)[:, None] + step_gy**2 * x_.square().sum(0)[None]) / (24 * gw.square())
    assert counts.counts["layer.weight"][3].item() == pytest.approx(p.clamp(max=1).sum().item(), rel=1e-3)


def saved_bytes(config: Config, model: nn.Module, x: Tensor) -> int:
    """Bytes of activations that backward keeps, by autograd's own account."""
    t = transformed(config, model, x)
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        t.model(x)
    own = {p.untyped_storage().data_ptr() for p in t.model.parameters()}
    return sum(size for place, size in held.items() if place not in own)


@pytest.mark.parametrize("act", [nn.ReLU, nn.ReLU6])
def test_backward_keeps_four_bytes_of_a_layer_where_autograd_keeps_eight(act: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[m for _ in range(3) for m in (*conv_bn(8, 8), act())])
    x = torch.randn(16, 8, 12, 12)
    elements = x.numel()
    narrow = saved_bytes(only(PSG()), model, x)
    assert 3 * 4 * elements <= narrow < 3 * 4 * elements * 1.1  # codes of x 1, of the norm's input 2, the mask 1
    wide = saved_bytes(only(PSG(), Bits(norm_saved=None)), model, x)
    assert wide - narrow == pytest.approx(3 * 2 * elements, rel=0.01)


@pytest.mark.parametrize("act", [nn.ReLU, nn.ReLU6, nn.Hardtanh])
def test_what_is_saved_narrowly_gives_the_same_gradients(act: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(conv_bn(3, 8), act(), conv_bn(8, 8), act(), PooledHead(8, 4))
    x = 2 * torch.randn(6, 3, 8, 8)
    wide, narrow = (transformed(only(None, bits), copy.deepcopy(model), x) for bits in (Bits(norm_saved=None), Bits()))
    assert torch.equal(wide.model(x), narrow.model(x))
    found = backward(narrow, x)
    for name, gradient in backward(wide, x).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=2e-3 * gradient.abs().max().item(), msg=name)


# What is defined for values and calls out of the ordinary


def one_layer(scale: Any = "mean", **options: Any) -> tuple[Transformed, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(8, 6)
    return e2pass.transform(nn.Linear(6, 5), x, config=only(PSG(scale=scale, **options))), x


@pytest.mark.parametrize("scale", ["mean", "unit"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_stays_so(scale: str, bad: float) -> None:
    t, x = one_layer(scale)
    x.requires_grad_()
    gy = torch.randn(8, 5)
    gy[2, 3] = bad
    t.model(x).backward(gy)
    gradient = t.model.get_parameter("weight").grad
    assert gradient is not None
    assert gradient.isnan().all()
    assert x.grad is not None
    assert x.grad.isnan().any()


def test_an_all_zero_gradient_updates_nothing() -> None:
    t, x = one_layer("unit", stats=True)
    t.model(x).backward(torch.zeros(8, 5))
    gradient = t.model.get_parameter("weight").grad
    assert gradient is not None
    assert not gradient.any()
    assert t.stats()["psg"]["weight"]["agreement"] == 1.0


def test_an_all_zero_weight_is_quantized_exactly() -> None:
    t, x = one_layer()
    with torch.no_grad():
        t.model.get_parameter("weight").zero_()
    out = t.model(x)
    torch.testing.assert_close(out, t.model.get_parameter("bias").expand(8, 5))
    out.sum().backward()
    assert ternary(t.model.get_parameter("weight").grad)  # type: ignore[arg-type]


def test_parameters_without_gradient_and_frozen_ones_have_none() -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.frozen, self.unused = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.used(self.frozen(x))
            return y

    model = Partly()
    model.frozen.requires_grad_(False)
    x = torch.randn(4, 6)
    t = e2pass.transform(model, x, config=only(PSG()))
    t.model(x).sum().backward()
    gradients = {name: p.grad for name, p in t.model.named_parameters()}
    assert {name for name, g in gradients.items() if g is not None} == {"used.weight", "used.bias"}


def test_accumulated_signs_are_a_vote_and_retain_graph_repeats_it() -> None:
    t, x = one_layer("unit")
    weight = t.model.get_parameter("weight")
    out = t.model(x)
    gy = torch.randn(8, 5)
    out.backward(gy, retain_graph=True)
    assert weight.grad is not None
    once = weight.grad.clone()
    out.backward(gy)
    assert torch.equal(weight.grad, 2 * once)
    t.model(x).backward(-gy)
    torch.testing.assert_close(weight.grad, once)
