"""Compiler passes that rewrite a PyTorch model to train with E2-Train, and price the training step."""

from __future__ import annotations

__version__ = "0.1.0.dev0"
