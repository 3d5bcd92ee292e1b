"""The demo's images: scikit-learn's digits, or CIFAR-10 stored as JPEG in one ``.npz`` file."""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import TensorDataset

from e2pass.errors import InputError

CIFAR_MEAN = (0.4913, 0.4821, 0.4465)
CIFAR_STD = (0.2470, 0.2435, 0.2616)
DIGITS_SIZE = 16
TEST_SHARE = 0.2


@dataclass(frozen=True)
class Images:
    """A data set split into training and test images.

    Attributes:
        name: What it is called in the report.
        train: Pairs of image (3, H, W) in float32, normalised, and label.
        test: Likewise.
        note: What has to be said beside results.
    """

    name: str
    train: TensorDataset
    test: TensorDataset
    note: str = ""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (3, H, W) of one image."""
        channels, height, width = self.train.tensors[0].shape[1:]
        return channels, height, width

    def limited(self, limit: int | None) -> Images:
        """The same with at most ``limit`` training and ``limit`` test images; both are in random order already."""
        if limit is None:
            return self
        train, test = (TensorDataset(*(t[:limit] for t in part.tensors)) for part in (self.train, self.test))
        return Images(self.name, train, test, f"{self.note} First {limit} images only.".strip())


def load_digits() -> Images:
    """Scikit-learn's 1797 digits of 8x8, enlarged to 16x16 with three equal channels; every fifth is for the test.

    Raises:
        InputError: If scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError:
        raise InputError(
            "the demo's digits come with scikit-learn; install it with pip install 'e2pass[data]'"
        ) from None
    digits = load()
    images = torch.from_numpy(digits.images).float().unsqueeze(1)
    images = functional.interpolate(images, size=(DIGITS_SIZE, DIGITS_SIZE), mode="bilinear", align_corners=False)
    images = ((images - images.mean()) / images.std()).expand(-1, 3, -1, -1).contiguous()
    labels = torch.from_numpy(digits.target).long()
    # The split is the same for every seed, so that seeds differ by training alone.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return _split("scikit-learn digits", images, labels, order[round(len(order) * TEST_SHARE) :], order, "")


def _split(name: str, images: Tensor, labels: Tensor, train: Tensor, order: Tensor, note: str) -> Images:
    test = order[: len(order) - len(train)]
    return Images(name, TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test]), note)


def load_cifar10(path: str | Path) -> Images:
    """CIFAR-10 from an ``.npz`` with the arrays jpeg, offsets, label and train.

    ``jpeg`` holds all JPEG files end to end, ``offsets`` where each begins (and the end of the last), ``train`` which
    are for training. Files are often sorted by class, so both parts are shuffled.

    Raises:
        InputError: If the file is missing or not of this form, or Pillow is not installed.
    """
    pixels, labels, train = read_cifar10(path)
    parts = []
    for chosen in (train, ~train):
        index = np.random.default_rng(0).permutation(np.flatnonzero(chosen))
        if len(index) == 0:
            raise InputError(
                f"{path} marks {int(train.sum())} of {len(train)} images for training; both parts are needed"
            )
        parts.append(TensorDataset(_normalised(pixels[index]), torch.from_numpy(labels[index])))
    note = "The images were stored as JPEG: accuracies are a little below those on the original files."
    return Images("CIFAR-10", parts[0], parts[1], note)


def read_cifar10(path: str | Path) -> tuple[Any, Any, Any]:
    """The decoded images (N, 32, 32, 3) as bytes, labels (N,) and training flags (N,), in the order of the file.

    Raises:
        InputError: As ``load_cifar10``.
    """
    arrays = _arrays(Path(path))
    labels, train = arrays["label"].astype(np.int64), arrays["train"].astype(bool)
    if len(arrays["offsets"]) != len(labels) + 1 or len(train) != len(labels):
        raise InputError(
            f"{path} holds {len(labels)} labels, {len(train)} training flags and {len(arrays['offsets'])} offsets; "
            "there must be as many flags as labels, and one offset more"
        )
    return _decode(Path(path), arrays["jpeg"], arrays["offsets"]), labels, train


def _arrays(path: Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in ("jpeg", "offsets", "label", "train")}
    except OSError as error:
        raise InputError(f"cannot read the data file {path}: {error.strerror or error}") from None
    except (KeyError, ValueError, EOFError, zipfile.BadZipFile, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is no CIFAR-10 file: an .npz with arrays jpeg, offsets, label and train is needed ({error})"
        ) from None


def _decode(path: Path, jpeg: Any, offsets: Any) -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise InputError("CIFAR-10 is stored as JPEG and needs Pillow; pip install 'e2pass[data]'") from None
    pixels = np.empty((len(offsets) - 1, 32, 32, 3), np.uint8)
    for i in range(len(pixels)):
        data = jpeg[int(offsets[i]) : int(offsets[i + 1])].tobytes()
        try:
            pixels[i] = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        except (OSError, ValueError) as error:
            raise InputError(f"image {i} of {path} is no 32x32 JPEG: {error}") from None
    return pixels


def _normalised(pixels: Any) -> Tensor:
    """From (N, H, W, 3) bytes to (N, 3, H, W) floats of mean 0 and deviation 1 per channel."""
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(255)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (CIFAR_MEAN, CIFAR_STD))
    return images.sub_(mean).div_(std).contiguous()
