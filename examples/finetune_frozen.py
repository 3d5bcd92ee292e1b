"""Fine-tune the last layer of a frozen network: no gradient is computed that nobody needs, and the report shows it."""

from __future__ import annotations

import torch
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import e2pass
from e2pass.models import resnet


def main() -> None:
    torch.manual_seed(0)
    model = resnet(8)
    for parameter in model.parameters():
        parameter.requires_grad = False
    model.fc.requires_grad_(True)
    x, y = torch.randn(128, 3, 16, 16), torch.randint(10, (128,))
    loader = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True)

    t = e2pass.transform(model, x[:32], loader, config="psg")
    before = {name: p.clone() for name, p in t.unwrap().named_parameters()}
    trained = [p for p in t.model.parameters() if p.requires_grad]
    opt = torch.optim.SGD(trained, lr=0.1, momentum=0.9)
    for images, labels in t.loader or loader:
        opt.zero_grad()
        functional.cross_entropy(t.model(images), labels).backward()
        opt.step()
    changed = {name for name, p in t.unwrap().named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"fc.weight", "fc.bias"}, changed

    # Weight gradients are computed for the head alone, and nothing flows back beyond it.
    report = t.report()
    for name, step in report.steps.items():
        layers = {phase: {row.layer for row in step.rows if row.phase == phase} for phase in ("dw", "dx", "update")}
        print(f"{name}: dW of {layers['dw']}, dX of {layers['dx'] or 'nothing'}, update of {layers['update']}")
        assert layers["dw"] == {"fc"}
        assert not layers["dx"]
        assert layers["update"] == {"fc"}

    whole = e2pass.analyze(resnet(8), x[:32]).baseline.totals.energy_j
    print(
        f"a full step: {1e3 * whole:.1f} mJ; the frozen one: {1e3 * report.baseline.totals.energy_j:.1f} mJ (modelled)"
    )
    assert report.baseline.totals.energy_j < 0.5 * whole


if __name__ == "__main__":
    main()
