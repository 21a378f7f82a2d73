"""A run that is killed at random moments and started again is the run that was not, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.killed_runs import kill_again_and_again

pytestmark = pytest.mark.distributed

# Two processes are started for each; four, and a hundred kills, with `python -m tests.fuzz.killed_runs --kills 100`.
KILLS = 10


def test_a_run_that_is_killed_again_and_again(tmp_path: Path) -> None:
    lives = kill_again_and_again(tmp_path, KILLS, seed=1, stages=1)
    assert lives.wrong == []
    assert sum(lives.killed.values()) == KILLS and lives.steps
