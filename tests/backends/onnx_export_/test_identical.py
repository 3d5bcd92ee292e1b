"""A quantized step with predicted signs in onnxruntime, half by half on the operands that PyTorch had."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

import e2pass
from tests.backends.onnx_export_.identical import Checker, recorded
from tests.zoo import Residual


def test_what_differs_on_the_same_codes_are_ties(tmp_path: Path) -> None:
    """Dense, strided and depthwise convolutions, and linear layers on images and on tokens, at 8 and 16 bits."""
    torch.manual_seed(0)
    separable = nn.Sequential(
        nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
    )
    tokens = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), Residual(separable), nn.Flatten(2), Residual(tokens), nn.Flatten(),
        nn.Linear(128, 10),
    )  # fmt: skip
    x, y = torch.randn(2, 16, 3, 8, 8), torch.randint(0, 10, (2, 16))
    t = e2pass.transform(model, x[0], config="e2train")
    optimizer = torch.optim.SGD(t.param_groups(0.1), lr=0.1)
    functional.cross_entropy(t.model(x[0]), y[0]).backward()
    optimizer.step()
    with recorded(t) as records:
        functional.cross_entropy(t.model(x[1]), y[1]).backward()
    products = [
        (str(n.target), n.args[9] if "convolution" in str(n.target) else 1)
        for r in records.values()
        for n in r.half.graph.nodes
        if n.meta.get("e2_tag") == "psg.predict"
    ]
    assert {("aten.convolution_backward.default", 1), ("aten.convolution_backward.default", 8)} <= set(products)
    assert ("aten.mm.default", 1) in products

    checker = Checker(tmp_path)
    checker.add(records)
    found = checker.found
    predicted = {d.node for d in t.diagnostics.with_code("E2P410")}
    assert found.signs == sum(p.numel() for n, p in t.model.named_parameters() if n in predicted)
    assert found.equal >= 0.999 * found.signs
    assert found.beyond == 0, "a sign that is not the exact one lies outside the rounding bound of a tie"
    assert found.codes > 20_000
    assert found.flipped <= 1e-3 * found.codes
    assert found.flipped_by_more == 0
    assert found.flip_distance < 1e-6
    assert found.value_difference < 1e-5, found.worst
