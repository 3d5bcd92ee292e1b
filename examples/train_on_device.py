"""Train a model on a device that has onnxruntime and NumPy, and no PyTorch.

The first part, on the workstation, writes the whole training step to one ONNX file. The second part is another process:
it never imports torch, and trains an epoch of digits with the file. The third part, on the workstation again, brings
the result back into PyTorch and goes on there.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np

BATCH = 32


def workstation(step: Path, data: Path, trained: Path) -> None:
    import torch

    import e2pass
    from e2pass.backends.onnx_export import export_training, load_training_state
    from e2pass.demo.data import load_digits

    torch.manual_seed(0)
    images, labels = load_digits().train.tensors
    np.savez(data, images=images.numpy(), labels=labels.numpy())
    # With "bit-true" the device finds the integer codes that PyTorch would find: its steps can be checked.
    t = e2pass.transform(e2pass.models.resnet(8), images[:BATCH], config="bit-true")
    optimizer = torch.optim.SGD(t.param_groups(lr=0.05), lr=0.05, momentum=0.9)
    export_training(t, images[:BATCH], labels[:BATCH], step, optimizer=optimizer)
    print(f"wrote {step.name}: {step.stat().st_size / 1e6:.1f} MB")

    subprocess.run([sys.executable, __file__, "device"], check=True)

    load_training_state(t, trained, optimizer)
    losses = []
    for start in range(0, 5 * BATCH, BATCH):
        optimizer.zero_grad()
        batch = slice(start, start + BATCH)
        loss = torch.nn.functional.cross_entropy(t.model(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"5 steps more in PyTorch: loss {np.mean(losses):.2f}")


def train(step: Path, data: Path, trained: Path) -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # without a word on each weight that is an input and has a default
    session = onnxruntime.InferenceSession(str(step), options, providers=["CPUExecutionProvider"])
    outputs = [output.name for output in session.get_outputs()]
    digits = np.load(data)
    images, labels = digits["images"], digits["labels"]
    order = np.random.default_rng(0).permutation(len(labels))
    state: dict[str, np.ndarray] = {}  # empty: the first step starts from the values in the file
    losses = []
    for start in range(0, len(order) - BATCH + 1, BATCH):
        batch = order[start : start + BATCH]
        feeds = {"x": images[batch], "target": labels[batch], **state}
        found = dict(zip(outputs, session.run(None, feeds), strict=True))
        state = {name.removeprefix("next."): value for name, value in found.items() if name.startswith("next.")}
        losses.append(float(found["loss"]))
    np.savez(trained, allow_pickle=False, **state)
    assert "torch" not in sys.modules
    print(f"{len(losses)} steps without torch: loss {np.mean(losses[:5]):.2f} -> {np.mean(losses[-5:]):.2f}")
    entered = state["e2_slu.opened"].sum() / state["e2_slu.decided"].sum()
    print(f"samples that entered the gated blocks: {entered:.0%}")


def main() -> None:
    step, data, trained = Path("training_step.onnx"), Path("digits.npz"), Path("trained.npz")
    if sys.argv[1:] == ["device"]:
        train(step, data, trained)
        return
    workstation(step, data, trained)


if __name__ == "__main__":
    main()
