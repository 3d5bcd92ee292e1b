"""How the training graph leaves the library: as text, networkx, DOT, SVG and a page for the browser."""

from __future__ import annotations

from e2pass.backends.graph.writers import GraphWriters

__all__ = ["GraphWriters"]
