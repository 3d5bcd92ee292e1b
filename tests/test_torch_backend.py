"""The backend of torch.compile beside transform: the same rewrites, so the same gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import e2pass
from tests.zoo import PooledHead, Residual, conv_bn

MLP = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4))
CNN = nn.Sequential(conv_bn(3, 8), nn.ReLU(), Residual(conv_bn(8, 8), nn.ReLU()), PooledHead(8, 4))


@pytest.mark.parametrize(("model", "shape"), [(MLP, (8, 6)), (CNN, (8, 3, 6, 6))], ids=["mlp", "cnn"])
def test_a_compiled_model_trains_as_a_transformed_one(model: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    x, y = torch.randn(shape), torch.randint(0, 4, (shape[0],))
    t = e2pass.transform(copy.deepcopy(model), x, config="psg")
    plain = copy.deepcopy(model)
    compiled = torch.compile(plain, backend=e2pass.psg_backend())
    for batch in (8, 5):  # another batch size makes the sizes of torch.compile symbolic
        outputs = t.model(x[:batch]), compiled(x[:batch])
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
        for output in outputs:
            nn.functional.cross_entropy(output, y[:batch]).backward()
    wanted = dict(t.model.named_parameters())
    magnitudes = {}
    for name, parameter in plain.named_parameters():
        found, expected = parameter.grad, wanted[name].grad
        assert found is not None
        assert expected is not None
        same = torch.isclose(found, expected, rtol=1e-3, atol=1e-6)
        assert same.float().mean() > 0.97, name  # rounding decides the sign of what is next to zero
        magnitudes[name] = len(found.abs().unique())
    assert magnitudes["0.weight" if shape == (8, 6) else "0.0.weight"] <= 4  # two means, added or subtracted
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(buffer, t.model.get_buffer(name), rtol=1e-3, atol=1e-4)
    plain.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), plain(x), rtol=0.0, atol=0.03)  # 8 bits beside fp32


def test_options_that_need_a_state_are_refused() -> None:
    with pytest.raises(e2pass.E2PassError, match=r"PSG\.warmup needs"):
        e2pass.psg_backend(e2pass.PSG(warmup=3))
    with pytest.raises(e2pass.E2PassError, match=r"Bits\.exclude needs"):
        e2pass.psg_backend(bits=e2pass.Bits(exclude=("fc.*",)))


def test_compile_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(e2pass.E2PassError, match="CXX = no-such-compiler is not on the PATH"):
        e2pass.psg_backend(compile=True)
    with pytest.raises(e2pass.E2PassError, match="compile=True needs a C"):
        e2pass.transform(MLP, torch.randn(2, 6), config=e2pass.Config(smd=None, slu=None, compile=True))
