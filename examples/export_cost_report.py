"""Price a training step without training, and write the report as JSON, CSV, Markdown, LaTeX and an HTML page."""

from __future__ import annotations

import torch

import e2pass
from e2pass.backends.html import to_html
from e2pass.models import resnet


def main() -> None:
    report = e2pass.analyze(resnet(8), torch.randn(128, 3, 32, 32), board="zedboard", config="e2train")
    print(report.table())

    # 64,000 steps of 128 images: the length of a CIFAR-10 run in the ResNet and E2-Train papers.
    run = report.for_run(steps=64_000)
    assert run.transformed is not None
    print(f"plain run:       {run.baseline.energy_kj:.0f} kJ, {run.baseline.hours:.1f} h (modelled)")
    print(f"transformed run: {run.transformed.energy_kj:.0f} kJ, {run.transformed.hours:.1f} h (modelled)")

    report.to_json("cost_report.json")
    report.to_csv("cost_report.csv")
    report.to_markdown("cost_report.md")
    report.to_latex("cost_report.tex")
    to_html(report.with_run(steps=64_000), "cost_report.html")


if __name__ == "__main__":
    main()
