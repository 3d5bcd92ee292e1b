"""Does PSG's mean scale keep the meaning of learning rates? fp32 SGD beside PSG at the same learning rate.

    python -m benchmarks.psg_scale --out scale.json        # resumable; prints the table of docs/psg.md

A LayerNorm transformer (the rows of an image are its tokens) and a ResNet-8 on scikit-learn's digits, each plain, under
gradient clipping and under loss scaling; three seeds. The learning rate is one that suits fp32 SGD, and is not changed;
beside them ``unit`` with the learning rate that the documentation advises for it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import e2pass
from e2pass.demo.data import Images, load_digits
from e2pass.report import save

LR = {"transformer": 0.05, "resnet": 0.1}
ADVISED = {"transformer": 0.001, "resnet": 0.03}
"""What the documentation advises for ``scale="unit"``: without and with batch norms."""
EPOCHS, BATCH = 10, 32
UNIT = e2pass.Config(smd=None, slu=None, psg=e2pass.PSG(scale="unit"))
METHODS: dict[str, tuple[e2pass.Config | None, dict[str, float]]] = {
    "fp32": (None, LR),
    "psg, mean": (e2pass.Config(smd=None, slu=None), LR),
    "psg, unit": (UNIT, LR),
    "psg, unit, advised lr": (UNIT, ADVISED),
}
"""Each with its learning rates."""
SETTINGS = ("plain", "clipped to 1", "loss x 1024")


class RowTransformer(nn.Module):
    """Two encoder layers over the sixteen rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(16, 32), nn.Parameter(0.02 * torch.randn(16, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.norm(self.layers(self.embed(x[:, 0]) + self.place).mean(1)))
        return scores


def build(model: str) -> nn.Module:
    return RowTransformer() if model == "transformer" else e2pass.models.resnet(8)


def run(model: str, method: str, setting: str, seed: int, images: Images, epochs: int = EPOCHS) -> float:
    """Test accuracy after training."""
    torch.manual_seed(seed)
    network = build(model)
    (x, y), (test_x, test_y) = images.train.tensors, images.test.tensors
    config, rates = METHODS[method]
    lr = rates[model]
    if config is not None:
        network = e2pass.transform(network, x[:BATCH], config=config).model
    optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9)
    factor = 1024.0 if setting == "loss x 1024" else 1.0
    steps = epochs * (len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, cycle_momentum=False)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for chosen in torch.randperm(len(x), generator=generator).split(BATCH)[: len(x) // BATCH]:
            optimizer.zero_grad()
            (factor * functional.cross_entropy(network(x[chosen]), y[chosen])).backward()
            if factor != 1.0:
                for parameter in network.parameters():
                    if parameter.grad is not None:
                        parameter.grad /= factor
            if setting == "clipped to 1":
                nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    network.eval()
    with torch.no_grad():
        return float((network(test_x).argmax(1) == test_y).float().mean())


def table(results: dict[str, float], seeds: int) -> str:
    lines = [f"| model | setting | {' | '.join(METHODS)} |", "|---" * (2 + len(METHODS)) + "|"]
    for model in LR:
        for setting in SETTINGS:
            cells = []
            for method in METHODS:
                found = [results[k] for s in range(seeds) if (k := f"{model}/{method}/{setting}/{s}") in results]
                cells.append(f"{100 * sum(found) / len(found):.1f} %" if found else "-")
            lines.append(f"| {model}, lr {LR[model]} | {setting} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    results: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    images = load_digits()
    for seed in range(options.seeds):
        for model in LR:
            for setting in SETTINGS:
                for method in METHODS:
                    key = f"{model}/{method}/{setting}/{seed}"
                    if key not in results:
                        results[key] = run(model, method, setting, seed, images)
                        print(key, f"{100 * results[key]:.1f} %", flush=True)
                        save(json.dumps(results, indent=1), options.out)
    print(table(results, options.seeds))


if __name__ == "__main__":
    main()
