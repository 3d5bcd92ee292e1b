"""Networks of pytorchcv with the preset ``bit-true``: does forward have the same bits in PyTorch's other kernels?

    python -m benchmarks.bit_true [--every 3] [--only resnet] [--out out/bit_true.json]

For each network of ``block_counts.csv``, in training and in evaluation, on a batch of four: whether the result is equal
to the bit with oneDNN and NNPACK and without them; the share of gradients with the same sign; and what ``E2P401`` names
as dependent on the kernel. Finished networks are kept in the output file and not run again.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import e2pass
from benchmarks.block_table import HERE, build
from benchmarks.onnx_pair import other_kernels
from e2pass.errors import E2PassError
from e2pass.report import save

BATCH = 4


def measure(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """Compare one network in both sets of kernels."""
    t = e2pass.transform(model, x, config="bit-true")
    named = sorted({d.message.split(":")[0] for d in t.diagnostics.with_code("E2P401")})
    trained, signs = step(t.model, x)
    t.model.eval()
    evaluated = t.model(x)
    t.model.train()
    with other_kernels():
        again, other_signs = step(t.model, x)
        t.model.eval()
        evaluated_again = t.model(x)
    equal = sum(int((signs[name] == other_signs[name]).sum()) for name in signs)
    return {
        "training": torch.equal(trained, again),
        "evaluation": torch.equal(evaluated, evaluated_again),
        "signs": equal / sum(s.numel() for s in signs.values()),
        "named": named,
    }


def step(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The result of a copy in training, and the signs of its gradients."""
    torch.manual_seed(0)
    twin = copy.deepcopy(model)
    result = twin(x)
    (result * torch.linspace(-1, 1, result.numel()).view(result.shape)).sum().backward()
    return result.detach(), {name: p.grad.sign() for name, p in twin.named_parameters() if p.grad is not None}


def summary(done: dict[str, dict[str, Any]]) -> str:
    """What all finished networks showed."""
    found = [row for row in done.values() if "error" not in row]
    exact = [row for row in found if not row["named"]]
    lines = [f"{len(done) - len(found)} networks could not be transformed"]
    for rows, what in ((exact, "with nothing named"), (found, "in all")):
        both = sum(row["training"] and row["evaluation"] for row in rows)
        signs = min((row["signs"] for row in rows), default=1.0)
        lines.append(
            f"{both} of {len(rows)} {what} have equal bits; signs of gradients equal: at least {100 * signs:.2f} %"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="only every such network of the list")
    parser.add_argument("--only", default="", help="only networks whose name has this in it")
    parser.add_argument("--out", type=Path, default=Path("out/bit_true.json"))
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    done: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    rows = list(csv.DictReader((HERE / "block_counts.csv").open(encoding="utf-8")))
    for entry in rows[:: options.every]:
        name, size = entry["model"], int(entry["size"])
        if name in done or options.only not in name:
            continue
        torch.manual_seed(0)
        started = time.process_time()
        try:
            done[name] = measure(build(name, size), torch.randn(BATCH, 3, size, size))
        except E2PassError as error:
            done[name] = {"error": str(error)}
        save(json.dumps(done, indent=1) + "\n", options.out)
        print(f"{name} ({time.process_time() - started:.0f} s)", done[name], flush=True)
    print(summary(done))


if __name__ == "__main__":
    main()
