from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

from tests.browser import browser as browser

# No deadline: a slow machine is no failure. In CI the examples are the same each time.
hypothesis.settings.register_profile("e2pass", deadline=None, derandomize=bool(os.environ.get("CI")))
hypothesis.settings.load_profile("e2pass")


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    """Seed torch before each test and undo its global settings, so that no test depends on those before it."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    torch.set_default_dtype(torch.float32)
