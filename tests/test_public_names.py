from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

import e2pass


def declared_for_type_checkers() -> set[str]:
    """The names that ``e2pass/__init__.py`` imports under ``if TYPE_CHECKING``."""
    tree = ast.parse(Path(e2pass.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    return {
        alias.asname or alias.name
        for node in ast.walk(block)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def test_type_checkers_and_the_interpreter_see_the_same_names() -> None:
    assert declared_for_type_checkers() == {*e2pass._HOME, *e2pass._MODULES}
    assert declared_for_type_checkers() <= set(dir(e2pass))


@pytest.mark.parametrize("name", sorted(e2pass._HOME))
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(e2pass, name) is getattr(import_module(e2pass._HOME[name]), name)


@pytest.mark.parametrize("name", sorted(e2pass._HOME))
def test_no_module_would_replace_a_public_name(name: str) -> None:
    assert find_spec(f"e2pass.{name}") is None, f"importing e2pass/{name}.py would replace e2pass.{name}"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'tranform'"):
        e2pass.tranform  # noqa: B018


def test_models_are_there_without_an_import_of_their_own() -> None:
    code = "import e2pass; print(type(e2pass.models.resnet(8)).__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "ResNet"


def test_import_alone_does_not_load_torch() -> None:
    code = "import sys, e2pass; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
