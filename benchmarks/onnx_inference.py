"""Exported inference in onnxruntime beside PyTorch: gated ResNet-20, MobileNetV2 and a small ViT, on digits.

    python -m benchmarks.onnx_inference [--only resnet20/slu] [--out out/onnx_inference.json]

For each model and preset, after 40 training steps and 60 passes without one, in every form (blocks skipped per sample,
a single sample, masked) and at batches of 1, 7 and 64 test images: the largest difference of a logit relative to the
largest one, and whether every arg-max is equal; ``onnx.checker`` on the files; how many gates decide differently within
the batch of 64; and for single images whether the bodies in onnxruntime's profile are those that PyTorch entered.
Finished cases are kept in the output file and not run again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

import e2pass
from benchmarks.onnx_pair import MODELS, PRESETS, session, vit_loss
from e2pass.backends.onnx_export import export_inference
from e2pass.demo.data import load_digits
from e2pass.plan import Skip
from e2pass.report import save
from e2pass.transformed import Transformed

BATCHES = (1, 7, 64)
TRAIN_STEPS = 40
SETTLE = 60
"""Forward passes in training mode without an update: running statistics and the price of energy settle."""
PROFILED = 4


class Case:
    """A transformed model that has trained a little."""

    def __init__(self, model: str, preset: str) -> None:
        torch.manual_seed(0)
        digits = load_digits()
        self.images, labels = digits.train.tensors
        self.test = digits.test.tensors[0]
        self.key = "pixel_values" if model == "vit" else None
        loss = vit_loss if model == "vit" else nn.functional.cross_entropy
        config = e2pass.config.resolve(preset).model_copy(update={"smd": None})
        self.t: Transformed = e2pass.transform(MODELS[model](), self.inputs(self.images[:32]), config=config)
        optimizer = torch.optim.SGD(self.t.param_groups(0.02), lr=0.02, momentum=0.9)
        for step in range(TRAIN_STEPS):
            batch = slice(32 * step, 32 * (step + 1))
            optimizer.zero_grad()
            loss(self.call(self.images[batch]), labels[batch]).backward()
            optimizer.step()
        for step in range(SETTLE):  # the gates' running statistics lag behind weights that still move fast
            self.call(self.images[32 * (step % TRAIN_STEPS) : 32 * (step % TRAIN_STEPS + 1)])
        self.t.model.eval()
        slu = self.t.model.e2_slu
        assert slu is not None
        self.slu = slu
        self.bodies = [s.body.name for s in self.t.model._executable.plans["eval"].steps if isinstance(s, Skip)]

    def inputs(self, images: Tensor) -> Any:
        return images if self.key is None else {self.key: images}

    def call(self, images: Tensor) -> Any:
        return self.t.model(images) if self.key is None else self.t.model(**{self.key: images})

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        output = self.call(images)
        result: Tensor = output if isinstance(output, Tensor) else output.logits
        return result

    def opened(self, images: Tensor) -> list[int]:
        """Samples that enter each gated block."""
        before = self.slu.opened_eval.clone()
        self.logits(images)
        return [round(n) for n in (self.slu.opened_eval - before).tolist()]

    def compare(self, run: onnxruntime.InferenceSession, images: Tensor) -> tuple[float, bool]:
        """Largest difference relative to the largest logit, and whether every arg-max is equal."""
        expected = self.logits(images).numpy()
        (found, *_) = run.run(None, {run.get_inputs()[0].name: images.numpy()})
        difference = float(np.abs(found - expected).max() / np.abs(expected).max())
        return difference, bool((found.argmax(1) == expected.argmax(1)).all())

    def profile(self, path: Path, image: Tensor) -> bool:
        """Whether the bodies with nodes in onnxruntime's profile are those that PyTorch enters."""
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.enable_profiling = True
        options.profile_file_prefix = str(path.with_suffix(""))
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        run = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        run.run(None, {run.get_inputs()[0].name: image.numpy()})
        file = Path(run.end_profiling())
        names = {event["name"] for event in json.loads(file.read_text()) if event["cat"] == "Node"}
        file.unlink()
        ran = {body for body in self.bodies if any(f"{body}/" in name for name in names)}
        entered = {body for body, n in zip(self.bodies, self.opened(image), strict=True) if n}
        return ran == entered


def measure(case: Case, stem: Path) -> dict[str, Any]:
    forms = {
        "skipping": export_inference(case.t, case.inputs(case.test[:2]), stem.with_suffix(".skipping.onnx")),
        "single": export_inference(
            case.t, case.inputs(case.test[:1]), stem.with_suffix(".single.onnx"), dynamic_batch=False
        ),
        "masked": export_inference(case.t, case.inputs(case.test[:2]), stem.with_suffix(".masked.onnx"), masked=True),
    }
    result: dict[str, Any] = {"forms": {}}
    for form, path in forms.items():
        onnx.checker.check_model(path, full_check=True)
        run = session(path)
        rows = {}
        for batch in BATCHES if form != "single" else (1,):
            difference, equal = case.compare(run, case.test[:batch])
            rows[str(batch)] = {"difference": difference, "equal_argmax": equal}
        result["forms"][form] = rows
    opened = case.opened(case.test[:64])
    result["gates"] = len(opened)
    result["gates_that_differ_within_64"] = sum(0 < n < 64 for n in opened)
    result["skip_ratio_of_64"] = 1 - sum(opened) / (64 * len(opened))
    images = [case.test[i : i + 1] for i in range(PROFILED)]
    for form in ("single", "skipping"):
        result[f"profiles_equal_{form}"] = sum(case.profile(forms[form], image) for image in images)
    result["profiles"] = PROFILED
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="one case, MODEL/PRESET")
    parser.add_argument("--out", type=Path, default=Path("out/onnx_inference.json"))
    options = parser.parse_args()
    folder = options.out.parent / "onnx_inference"
    folder.mkdir(parents=True, exist_ok=True)
    done: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    for model in MODELS:
        for preset in PRESETS:
            name = f"{model}/{preset}"
            if name in done or options.only not in (None, name):
                continue
            done[name] = measure(Case(model, preset), folder / f"{model}_{preset}")
            save(json.dumps(done, indent=1) + "\n", options.out)
            print(name, json.dumps(done[name]), flush=True)


if __name__ == "__main__":
    main()
