"""The demo: its data, one short run of it, and what it refuses."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from e2pass.demo.data import load_cifar10, load_digits
from e2pass.demo.run import run_demo
from e2pass.demo.train import accuracy
from e2pass.errors import InputError
from e2pass.report import CostReport

sklearn_datasets = pytest.importorskip("sklearn.datasets")
Image = pytest.importorskip("PIL.Image")

CLASSES = 10


def write_cifar(path: Path, per_class: int = 8) -> Path:
    """A file of the CIFAR-10 form, sorted by class; an image's red channel tells its class."""
    files, labels, train = [], [], []
    for label in range(CLASSES):
        for i in range(per_class):
            buffer = io.BytesIO()
            Image.new("RGB", (32, 32), (20 * label, 100, 50)).save(buffer, "JPEG", quality=95)
            files.append(buffer.getvalue())
            labels.append(label)
            train.append(i % 4 != 0)
    offsets = np.cumsum([0, *map(len, files)])
    jpeg = np.frombuffer(b"".join(files), np.uint8)
    np.savez(
        path, jpeg=jpeg, offsets=offsets, label=np.array(labels), train=np.array(train), classes=np.arange(CLASSES)
    )
    return path


def test_digits_are_all_there_once() -> None:
    images = load_digits()
    original = sklearn_datasets.load_digits()
    assert images.shape == (3, 16, 16)
    assert len(images.train) + len(images.test) == len(original.target)
    labels = torch.cat([images.train.tensors[1], images.test.tensors[1]])
    assert sorted(labels.tolist()) == sorted(original.target.tolist())
    x = torch.cat([images.train.tensors[0], images.test.tensors[0]])
    assert len(torch.unique(x.flatten(1), dim=0)) == len(np.unique(original.images.reshape(-1, 64), axis=0))
    assert torch.equal(x[:, 0], x[:, 2])


def test_cifar_is_decoded_shuffled_and_split(tmp_path: Path) -> None:
    images = load_cifar10(write_cifar(tmp_path / "cifar.npz"))
    assert images.shape == (3, 32, 32)
    assert (len(images.train), len(images.test)) == (60, 20)
    x, y = images.train.tensors
    assert not torch.equal(y, y.sort().values)  # sorted by class in the file
    red = x[:, 0].mean((1, 2)) * 0.2470 + 0.4913
    assert torch.allclose(red, 20 * y / 255, atol=0.02)  # the image still goes with its label
    assert "JPEG" in images.note


def test_cifar_files_that_will_not_do(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the data file"):
        load_cifar10(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(InputError, match="is no CIFAR-10 file"):
        load_cifar10(tmp_path / "text.npz")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(InputError, match="jpeg, offsets, label and train"):
        load_cifar10(tmp_path / "other.npz")
    arrays = dict(np.load(write_cifar(tmp_path / "cifar.npz")))
    np.savez(tmp_path / "short.npz", **arrays | {"label": arrays["label"][:-1]})
    with pytest.raises(InputError, match="as many flags as labels"):
        load_cifar10(tmp_path / "short.npz")
    np.savez(tmp_path / "broken.npz", **arrays | {"jpeg": np.zeros_like(arrays["jpeg"])})
    with pytest.raises(InputError, match=r"image 0 of .* is no 32x32 JPEG"):
        load_cifar10(tmp_path / "broken.npz")


def test_accuracy_counts_right_answers() -> None:
    images = load_digits()
    labels = images.test.tensors[1]

    class Zero(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.one_hot(torch.zeros(len(x), dtype=torch.int64), CLASSES)

    assert accuracy(Zero(), images.test) == pytest.approx(float((labels == 0).float().mean()))


@pytest.mark.slow
def test_demo_prints_one_table_and_writes_its_files(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    out = tmp_path / "deep" / "out"
    (result,) = run_demo(epochs=1, seeds=[3], out=out, limit=256, console=console)
    assert isinstance(console.file, io.StringIO)
    printed = console.file.getvalue()
    for text in ("seed 3", "test accuracy of t.unwrap()", "batches dropped", "energy saved (modelled)", "wall-clock"):
        assert text in printed
    assert printed.count("test accuracy  ") == 1
    assert {path.name for path in out.iterdir()} == {
        "demo.json", "cost_report.json", "cost_report.html", "training_graph.txt",
    }  # fmt: skip

    assert result.plain.batches == result.transformed.batches_nominal == 256 // 32
    assert 0 < result.transformed.batches < result.plain.batches
    data = json.loads((out / "demo.json").read_text())
    (seed,) = data["seeds"]
    assert seed["seed"] == 3
    assert seed["transformed"]["accuracy"] == result.transformed.accuracy
    assert data["mean"]["test accuracy"]["plain"] == result.plain.accuracy
    cost = CostReport.from_json(out / "cost_report.json")
    assert cost.board in (out / "cost_report.html").read_text()
    assert cost.saving.energy == pytest.approx(result.transformed.saving_energy)
    assert cost.assumptions["rates"] == "measured"
    assert "region" in (out / "training_graph.txt").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": 0}, "epochs = 0 is not allowed"),
        ({"seeds": []}, "no seed was given"),
        ({"data": Path("none.npz")}, "cannot read the data file none.npz"),
        ({"limit": 5}, "5 training images do not fill a mini-batch of 32"),
    ],
)
def test_bad_input_leaves_nothing_behind(
    arguments: dict[str, object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        run_demo(**arguments)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_out_that_is_a_file_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(InputError, match="is not a folder"):
        run_demo(out=tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"
