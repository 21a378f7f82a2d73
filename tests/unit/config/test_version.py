"""One version: the package's, the distribution's, and the one that checkpoints carry."""

from __future__ import annotations

import re
import tomllib
from importlib import import_module
from pathlib import Path

import dsv3_megatron
from dsv3_megatron.config.version import __version__

ROOT = Path(__file__).resolve().parents[3]


def test_the_distribution_is_built_with_the_version_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    module, _, name = project["tool"]["setuptools"]["dynamic"]["version"]["attr"].rpartition(".")
    assert getattr(import_module(module), name) == __version__ == dsv3_megatron.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)
