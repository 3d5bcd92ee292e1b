"""The guards for a package whose sub-packages live beside it (pyproject.toml maps them, two links serve the tools)."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from importlib import import_module, resources
from importlib.metadata import entry_points, version
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import e2pass

ROOT = Path(__file__).resolve().parent.parent
MAPPED = {"e2pass": "e2pass", "e2pass.passes": "passes", "e2pass.backends": "backends"}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def packages_in_the_tree() -> set[str]:
    """Every folder with Python or package data below the three roots, links not followed."""
    found: set[str] = set()
    for package, root in MAPPED.items():
        for folder, subfolders, files in os.walk(ROOT / root):
            subfolders[:] = [name for name in subfolders if name != "__pycache__"]
            if any(Path(name).suffix in {".py", ".yaml"} for name in files):
                found.add(".".join([package, *Path(folder).relative_to(ROOT / root).parts]))
    return found


def test_pyproject_lists_every_package() -> None:
    listed = set(PYPROJECT["tool"]["setuptools"]["packages"])
    missing, stale = packages_in_the_tree() - listed, listed - packages_in_the_tree()
    assert not missing, f"[tool.setuptools] packages lacks {sorted(missing)}: they would vanish from the wheel"
    assert not stale, f"[tool.setuptools] packages lists {sorted(stale)}, which the tree does not have"


@pytest.mark.parametrize("package", PYPROJECT["tool"]["setuptools"]["packages"])
def test_every_package_is_a_real_package(package: str) -> None:
    assert import_module(package).__file__ is not None, f"{package} has no __init__.py"


def test_mapping_is_the_one_tested_here() -> None:
    assert PYPROJECT["tool"]["setuptools"]["package-dir"] == MAPPED


@pytest.mark.parametrize("name", ["passes", "backends"])
def test_links_point_to_the_top_level_folders(name: str) -> None:
    link = ROOT / "e2pass" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name  # relative: it must work in any clone


@pytest.mark.parametrize("name", ["passes", "backends"])
def test_top_level_import_is_refused(name: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert f"import e2pass.{name}, not {name}" in done.stderr


def test_no_generic_package_is_installed() -> None:
    """Seen from another folder only ``e2pass`` is importable, none of the folders beside it."""
    code = "import importlib.util as u; print([n for n in ('passes', 'backends', 'tests') if u.find_spec(n)])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_package_data_is_reachable() -> None:
    assert resources.files("e2pass").joinpath("py.typed").is_file()
    listed = {path.name for path in (ROOT / "backends/fpga/boards").glob("*.yaml")}
    seen = {entry.name for entry in resources.files("e2pass.backends.fpga.boards").iterdir()}
    assert listed <= seen


@pytest.mark.parametrize("folder", ["e2pass", "tests", "examples", "benchmarks"])
def test_every_folder_of_code_is_type_checked(folder: str) -> None:
    checked = folder in PYPROJECT["tool"]["mypy"]["files"]  # mypy refuses a folder without Python files
    assert checked == any((ROOT / folder).rglob("*.py"))


def test_version_is_stated_once() -> None:
    assert "version" not in PYPROJECT["project"]
    assert version("e2pass") == e2pass.__version__


def test_command_line_is_installed() -> None:
    (script,) = entry_points(group="console_scripts", name="e2pass")
    assert script.value == PYPROJECT["project"]["scripts"]["e2pass"]


def test_constraints_pin_every_direct_dependency_within_its_range() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    pinned = {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in pins}
    project = PYPROJECT["project"]
    declared = [*project["dependencies"], *chain.from_iterable(project["optional-dependencies"].values())]
    for requirement in map(Requirement, declared):
        if requirement.name != "e2pass":  # one extra includes another
            pin = pinned.get(canonicalize_name(requirement.name))
            assert pin is not None, f"constraints.txt does not pin {requirement.name}"
            assert requirement.specifier.contains(pin, prereleases=True), requirement
