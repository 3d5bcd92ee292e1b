"""How long the training graph of ResNet-110 takes: to build, to write, and to open and walk through in a browser.

    python -m benchmarks.graph_page [--depth 110] [--batch 32] [--out out/graph_page.html]

Needs Chromium and chromedriver. A page that is there already is only opened again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import e2pass
from e2pass.models import resnet
from tests.browser import Browser, chromium

READY = """const done = arguments[0], timer = setInterval(() => {
    if (document.getElementById("step")?.dataset.ready) { clearInterval(timer); done(performance.now()); } }, 5);"""
OPEN = "document.querySelector(`button[aria-label='Open ${arguments[0]}']`).click()"
SEARCH = """const field = document.getElementById("step-search"); field.value = arguments[0];
    field.dispatchEvent(new Event("input")); return document.querySelectorAll("#step-hits button").length"""
HIT = """document.querySelector("#step-hits button").click();
    return document.querySelector("#step-details h2").textContent"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=int, default=110)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("out/graph_page.html"))
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    if not arguments.out.exists():
        write(arguments.depth, arguments.batch, arguments.out)
    print(f"page: {arguments.out.stat().st_size / 1e6:.2f} MB")
    look_at(arguments.out)


def write(depth: int, batch: int, out: Path) -> None:
    """Transform, build the graph, write it in every form."""
    torch.manual_seed(0)
    t = timed("transform", lambda: e2pass.transform(resnet(depth), torch.randn(batch, 3, 32, 32), [None, None]))
    graph = timed("graph", lambda: t.graph)
    print(f"operations: {len(graph)}, edges: {len(graph.edges)}")
    timed("text", graph.to_text)
    timed("networkx", graph.to_networkx)
    timed("DOT, repeated blocks once", graph.to_dot)
    timed("diff", graph.diff)
    timed("page", lambda: graph.to_html(out))


def look_at(page: Path) -> None:
    """Open the page, open a module and a block in it, search, and go to a hit."""
    with chromium() as window:
        walk(window, page)


def walk(window: Browser, page: Path) -> None:
    """Do what a reader does, and print how long each step takes."""
    window.driver.set_script_timeout(60)
    window.open(page)
    print(f"open to ready: {window.driver.execute_async_script(READY):.0f} ms")
    timed("open a module of equal blocks", lambda: window.run(OPEN, "stage1"))
    timed("open a block", lambda: window.run(OPEN, "1"))
    hits = timed("search", lambda: window.run(SEARCH, "psg.msb stage3.1"))
    found = timed("go to a hit", lambda: window.run(HIT))
    print(f"{hits} hits shown, first {found}; console: {window.console() or 'silent'}")


def timed(what: str, act: Callable[[], Any]) -> Any:
    """Run ``act``, print what it took, return what it returned."""
    started = time.perf_counter()
    result = act()
    print(f"{what}: {1e3 * (time.perf_counter() - started):.0f} ms", flush=True)
    return result


if __name__ == "__main__":
    main()
