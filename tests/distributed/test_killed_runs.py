"""A run that is killed at random moments and started again is the run that was not, bit for bit."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from dsv3_megatron.checkpoint.folder import read_manifest
from dsv3_megatron.checkpoint.tensor_index import read_index
from tests.fuzz.killed_runs import differences, kill_again_and_again

pytestmark = pytest.mark.distributed

# Two processes are started for each; four, and a hundred kills, with `python -m tests.fuzz.killed_runs --kills 100`.
KILLS = 5


def test_a_run_that_is_killed_again_and_again(tmp_path: Path) -> None:
    lives = kill_again_and_again(tmp_path, KILLS, seed=1, stages=1)
    assert lives.wrong == []
    assert sum(lives.killed.values()) == KILLS and lives.steps and lives.checkpoints

    # The trial would have seen one bit, and says where it is.
    reference = read_manifest(tmp_path / "reference" / "saved")
    changed = dataclasses.replace(reference, path=tmp_path / "changed")
    shutil.copytree(reference.path, changed.path)
    index, place = max(read_index(reference).storage_data.items(), key=lambda entry: entry[1].length)
    content = bytearray((changed.path / place.relative_path).read_bytes())
    content[place.offset + 7] ^= 1
    (changed.path / place.relative_path).write_bytes(content)
    assert differences(reference, reference) == []
    file, entry = differences(changed, reference)
    assert place.relative_path in file
    assert entry.startswith(f"  {index.fqn}: 1 of its {place.length} bytes differ, from 7 to 7")
