"""A package that is installed, one that is not, and a folder that only has the name of one."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from dsv3_megatron.config.packages import is_installed

ROOT = Path(__file__).resolve().parents[3]


def test_packages_modules_and_what_is_built_in_are_installed_and_others_are_not() -> None:
    assert all(map(is_installed, ("torch", "decimal", "sys")))
    assert not is_installed("no_such_package_of_anybody")


def test_a_folder_that_is_called_as_a_package_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_tracker").mkdir()  # as W&B makes ./wandb
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not is_installed("some_tracker")
    (tmp_path / "some_tracker" / "__init__.py").write_text("")
    importlib.invalidate_caches()
    assert is_installed("some_tracker")


def test_nothing_else_looks_for_packages() -> None:
    """Elsewhere the question would be answered by a folder again."""
    found = [str(path.relative_to(ROOT)) for top in ("dsv3_megatron", "tools", "kernels")
             for path in sorted((ROOT / top).rglob("*.py")) if re.search(r"\bfind_spec\b", path.read_text())]
    assert found == ["dsv3_megatron/config/packages.py"]
