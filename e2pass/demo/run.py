"""The demo from start to end: data, both runs for every seed with progress bars, table and files."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from e2pass.demo import report
from e2pass.demo.data import Images, load_cifar10, load_digits
from e2pass.demo.train import Recipe, SeedResult, train_plain, train_transformed
from e2pass.errors import InputError
from e2pass.transformed import Transformed

DIGITS_RECIPE = Recipe()
CIFAR_RECIPE = Recipe(epochs=10, depth=20, batch_size=128)


def run_demo(
    *,
    data: Path | None = None,
    epochs: int | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    out: Path = Path("out"),
    limit: int | None = None,
    console: Console | None = None,
) -> list[SeedResult]:
    """Train plainly and transformed for every seed, print one table and write the files.

    Args:
        data: CIFAR-10 as ``.npz`` with JPEG files; None takes scikit-learn's digits.
        epochs: Nominal epochs of each run; None takes the recipe's.
        seeds: One pair of runs each.
        out: Folder for the files, made at the end.
        limit: At most so many training and test images.
        console: Where to print; default the standard output.

    Raises:
        InputError: For a data file, number or folder that will not do.
    """
    if epochs is not None and epochs < 1:
        raise InputError(f"epochs = {epochs} is not allowed: give a whole number of at least 1")
    if not seeds:
        raise InputError("no seed was given; give at least one, such as 0")
    _check_folder(out)
    recipe = DIGITS_RECIPE if data is None else CIFAR_RECIPE
    recipe = recipe if epochs is None else dataclasses.replace(recipe, epochs=epochs)
    # Without a terminal rich assumes 80 columns, too few for three seeds.
    console = console or (Console() if sys.stdout.isatty() else Console(width=140))
    with console.status("reading the images"):
        images = (load_digits() if data is None else load_cifar10(data)).limited(limit)
    results, last = _train_all(images, recipe, seeds, console)
    console.print(report.table(results, images, recipe))
    cost = last.report(rates="measured").to_json()
    for path in report.write(out, results, images, recipe, cost, last.graph.to_text()):
        console.print(f"wrote {path}", highlight=False)
    return results


def _train_all(
    images: Images, recipe: Recipe, seeds: Sequence[int], console: Console
) -> tuple[list[SeedResult], Transformed]:
    results: list[SeedResult] = []
    last: Transformed | None = None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        for seed in seeds:
            bar = progress.add_task(f"seed {seed}, plain SGD", total=recipe.epochs)
            plain = train_plain(images, recipe, seed, partial(progress.advance, bar))
            bar = progress.add_task(f"seed {seed}, {recipe.config}", total=recipe.epochs)
            transformed, last = train_transformed(images, recipe, seed, partial(progress.advance, bar))
            results.append(SeedResult(seed, plain, transformed))
    assert last is not None
    return results, last


def _check_folder(out: Path) -> None:
    """Say before the training, not after it, that its result could not be written."""
    existing = out.resolve()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise InputError(f"cannot write into {out}: {existing} is not a folder")
    if not os.access(existing, os.W_OK):
        raise InputError(f"cannot write into {out}: the folder {existing} is not writable")
