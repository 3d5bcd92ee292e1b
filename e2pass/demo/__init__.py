"""The demo: a small residual network on real images, trained plainly and transformed, side by side."""

from __future__ import annotations
