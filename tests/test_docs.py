"""The documents keep their promises: Python blocks run, relative links and make targets exist.

All blocks of a file run in order in one namespace, in an empty folder. A comment ``<!-- not run: why -->`` on the line
before a block excuses it. What a text block after a comment ``<!-- printed -->`` shows must be among what they print.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

import e2pass
from e2pass.cli import app
from e2pass.transformed import Transformed

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
BLOCK = re.compile(r"^(?P<excuse><!-- not run: .+ -->\n)?```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
PRINTED = re.compile(r"^<!-- printed -->\n```text\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://|mailto:|#)(?P<path>[^)#\s]+)")


@dataclass(frozen=True)
class Block:
    line: int  # of the first line of code, from 1
    code: str
    excused: bool


def python_blocks(text: str) -> list[Block]:
    return [
        Block(text.count("\n", 0, match.start("code")) + 1, match["code"], match["excuse"] is not None)
        for match in BLOCK.finditer(text)
    ]


def runnable(path: Path) -> list[Block]:
    return [block for block in python_blocks(path.read_text(encoding="utf-8")) if not block.excused]


def stripped(text: str) -> str:
    """Without spaces at the ends of lines and without empty lines."""
    return "\n".join(line.rstrip() for line in text.splitlines() if line.strip())


@pytest.mark.parametrize("document", [pytest.param(p, id=p.name) for p in DOCUMENTS if runnable(p)])
def test_python_blocks_run(
    document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in runnable(document):
        padding = "\n" * (block.line - 1)  # so that a traceback names the line of the document
        exec(compile(padding + block.code, str(document), "exec"), namespace)
    printed = stripped(capsys.readouterr().out)
    for shown in PRINTED.finditer(document.read_text(encoding="utf-8")):
        assert stripped(shown["text"]) in printed


@pytest.mark.parametrize("document", [pytest.param(p, id=p.name) for p in DOCUMENTS])
def test_relative_links_lead_somewhere(document: Path) -> None:
    targets = LINK.findall(document.read_text(encoding="utf-8"))
    assert [t for t in targets if not (document.parent / t).exists()] == []


@pytest.mark.parametrize("document", [pytest.param(p, id=p.name) for p in DOCUMENTS])
def test_make_targets_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    mentioned = set(re.findall(r"(?:^|`)make ([a-z-]+)", document.read_text(encoding="utf-8"), re.MULTILINE))
    assert mentioned <= targets


def prose() -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in DOCUMENTS if path.name != "CHANGELOG.md")


def test_every_public_name_is_documented() -> None:
    text = prose()
    names = {f"e2pass.{name}" for name in (*e2pass._HOME, *e2pass._MODULES)}
    assert {name for name in names if not re.search(rf"\b{re.escape(name)}\b", text)} == set()
    members = {name for name in vars(Transformed) if not name.startswith("_")} | {"model", "loader", "blocks"}
    assert {name for name in members if f"`{name}" not in text} == set()


def commands(group: Any, above: str = "e2pass") -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{above} {name}")
        else:
            yield f"{above} {name}", command


def test_every_command_is_documented_and_every_documented_line_is_understood() -> None:
    text = prose()
    known = dict(commands(typer.main.get_command(app)))
    assert {name for name in known if f"{name} " not in text and f"`{name}`" not in text} == set()
    lines = re.findall(r"^e2pass (?:.*\\\n)*.*$", text, re.MULTILINE)
    assert len(lines) >= 10
    for line in lines:
        words = shlex.split(line.replace("\\\n", " "), comments=True)
        name = next(name for name in (" ".join(words[:3]), " ".join(words[:2])) if name in known)
        known[name].make_context(name, words[len(name.split()) :])  # parses without running


def test_blocks_are_found_with_their_line_and_excuse() -> None:
    text = "a\n```python\nx = 1\n```\n<!-- not run: needs a board -->\n```python\ny\n```\n```bash\nz\n```\n"
    assert python_blocks(text) == [Block(3, "x = 1\n", False), Block(7, "y\n", True)]


def test_an_excuse_needs_a_reason_and_stands_right_before_the_block() -> None:
    assert not python_blocks("<!-- not run: -->\n```python\nx\n```\n")[0].excused
    assert not python_blocks("<!-- not run: old -->\n\n```python\nx\n```\n")[0].excused
