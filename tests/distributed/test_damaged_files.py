"""The quick part of tests/fuzz/files.py: files of every kind with a change, read by the commands that read them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.launch import run_ranks
from tests.fuzz.files import GOOD

pytestmark = pytest.mark.distributed


def test_no_change_of_a_file_is_silent(tmp_path: Path) -> None:
    run_ranks(1, "tests.fuzz.files", "--cases", "60", "--seed", "7", "--quick", "--json", str(tmp_path / "counts.json"))
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert set(counts["together"]) <= set(GOOD) and sum(counts["together"].values()) == 60
    assert counts["together"]["refused"] > 30 and counts["together"]["harmless"] > 2
    assert len(counts) > 12, "one reader or two would not tell much"
