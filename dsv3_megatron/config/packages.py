"""Whether a package that one feature needs is installed, without importing it."""

from __future__ import annotations

import importlib.util


def is_installed(module: str) -> bool:
    """Whether a top-level package can be imported; a folder of its name, such as W&B's own ./wandb, is none."""
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None  # a folder without __init__.py has no file of its own
