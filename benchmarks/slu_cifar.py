"""SLU on CIFAR-10 with ResNet-20: learned gates beside stochastic depth and plain training.

    python -m benchmarks.slu_cifar --data cifar10_jpeg.npz --out runs/slu --run learned-40
    python -m benchmarks.slu_cifar --out runs/slu --table        # what is there, as the table of docs/slu.md

A run is ``plain``, ``learned-P`` or ``random-P`` (stochastic depth with constant survival), P the target skip ratio in
percent; ``--out`` gets RUN.json, written after each epoch, and RUN.pt, from which a run that was stopped goes on.
``--epochs-now`` bounds the epochs of one call. The decoded images are kept in ``--cache`` (180 MB), by default in
``--out``. All runs share seed, order of images, augmentation and schedule.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import e2pass
from benchmarks import cifar
from benchmarks.cifar import LR, WEIGHT_DECAY, Data

GATES_LR = 0.02
SAMPLED_EVALUATIONS = 3


class Run(cifar.Run):
    """Plain, with learned gates, or with random ones."""

    def __init__(self, name: str, seed: int) -> None:
        self.kind, _, percent = name.partition("-")
        if self.kind not in ("plain", "learned", "random") or (self.kind == "plain") != (not percent):
            raise SystemExit(f"no run is called {name!r}: plain, learned-P or random-P with P in percent")
        config = None
        if percent:
            slu = e2pass.SLU(skip=int(percent) / 100, gate=self.kind, seed=seed)
            config = e2pass.Config(smd=None, slu=slu, psg=None, bits=None)
        super().__init__(config, seed)

    def groups(self) -> list[dict[str, Any]]:
        if self.transformed is None:
            return super().groups()
        groups: list[dict[str, Any]] = self.transformed.param_groups(LR, WEIGHT_DECAY, gates_lr=GATES_LR)
        return groups

    def observed(self) -> dict[str, Any]:
        return {} if self.transformed is None else {"skip_train": self.transformed.stats()["slu"]["skip_ratio"]}

    def test(self, data: Data, final: bool) -> dict[str, Any]:
        """As it decides in use; at the end also with every block run."""
        t = self.transformed
        if t is None:
            return super().test(data, final)
        if self.kind == "learned":
            result = self.gated(data)
        else:
            with t.set_gates("random", sampled=True):
                tests = [self.gated(data) for _ in range(SAMPLED_EVALUATIONS if final else 1)]
            result = tests[0] | {"accuracy": sum(r["accuracy"] for r in tests) / len(tests)}
        if final:
            if self.kind == "random":
                result["accuracy_expected"] = self.accuracy(data)
            with t.set_gates("open"):
                result["accuracy_open"] = self.accuracy(data)
        return result

    def gated(self, data: Data) -> dict[str, Any]:
        assert self.transformed is not None
        self.transformed.reset_stats()
        accuracy = self.accuracy(data)
        stats = self.transformed.stats()["slu"]
        blocks = {name: 1.0 - block["skip_ratio_eval"] for name, block in stats["blocks"].items()}
        return {"accuracy": accuracy, "skip_eval": stats["skip_ratio_eval"], "open_eval": blocks}


def table(out: Path) -> str:
    """The finished runs as Markdown."""
    lines = [
        "| run | skipped in training, last epoch | skipped in test | test accuracy | all blocks run | "
        "open for 5-95 % of test images | training, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for path in sorted(out.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        history = record["history"]
        last = history[-1]
        unfinished = "" if len(history) == record["epochs"] else f" (epoch {len(history)} of {record['epochs']})"
        opened = list(last.get("open_eval", {}).values())
        varied = sum(0.05 < share < 0.95 for share in opened)
        everything = [last[k] for k in ("accuracy_open", "accuracy_expected") if k in last]
        lines.append(
            f"| {record['run']}{unfinished} | {_percent(last.get('skip_train'))} | {_percent(last.get('skip_eval'))} | "
            f"{_percent(last['accuracy'], 2)} | {', weighted: '.join(_percent(a, 2) for a in everything) or '-'} | "
            f"{f'{varied} of {len(opened)} blocks' if opened else '-'} | {sum(h['seconds'] for h in history):.0f} |"
        )
    return "\n".join(lines)


def _percent(share: float | None, digits: int = 1) -> str:
    return "-" if share is None else f"{share:.{digits}%}".replace("%", " %")


if __name__ == "__main__":
    cifar.main(__doc__, Run, table, epochs=8)
