"""Transform a model that e2pass has never seen, and train it in the usual loop."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import e2pass


class Residual(nn.Module):
    """A residual block of one's own; nothing in it knows of e2pass."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.body(x)
        return out


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        Residual(16),
        Residual(16),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )
    # Four classes of noisy images, each brighter in a corner of its own.
    y = torch.arange(512) % 4
    x = torch.randn(512, 3, 8, 8)
    for image, label in zip(x, y.tolist(), strict=True):
        image[:, 4 * (label // 2) :, 4 * (label % 2) :][:, :4, :4] += 1.0
    loader = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True)

    t = e2pass.transform(model, x[:32], loader)

    opt = torch.optim.SGD(t.param_groups(0.05, 1e-4), momentum=0.9)
    for epoch in range(8):
        for images, labels in t.loader:
            opt.zero_grad()
            loss = functional.cross_entropy(t.model(images), labels)
            loss.backward()
            opt.step()
        print(f"epoch {epoch}: loss of the last batch {loss.item():.3f}")

    stats = t.stats()
    print(f"batches dropped: {stats['smd']['dropped']} of {stats['smd']['nominal']}")
    print(f"gated energy skipped: {stats['slu']['skip_ratio']:.0%}")
    print(f"energy saved (modelled): {t.report(rates='measured').saving.energy:.0%}")
    plain = t.unwrap()  # the original class with the trained weights
    model.load_state_dict(plain.state_dict())


if __name__ == "__main__":
    main()
