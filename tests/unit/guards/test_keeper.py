"""A checkpoint that cannot be written: the run goes on and tries again, unless it cannot do without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dsv3_megatron.checkpoint.folder import CheckpointError, RunProgress
from dsv3_megatron.config.training import CheckpointConfig
from dsv3_megatron.guards import keeper as module
from dsv3_megatron.guards.keeper import NEEDED_ATTEMPTS, CheckpointKeeper


class Disk:
    """Stands for the checkpoint's writer; refuses so many times."""

    def __init__(self) -> None:
        self.refusals = 0
        self.attempts: list[tuple[int, int]] = []

    def save(self, _save: str, progress: RunProgress, *_: Any, keep_last: int, **__: Any) -> None:
        self.attempts.append((progress.iteration, keep_last))
        if self.refusals:
            self.refusals -= 1
            raise CheckpointError("save=ck: a checkpoint needs 9 GB, 1 GB are free there")


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk()
    monkeypatch.setattr(module, "save_checkpoint", disk.save)
    monkeypatch.setattr(module, "on_first_rank", lambda action, _subject: action())
    monkeypatch.setattr(module.time, "sleep", lambda _seconds: None)
    return disk


def keeper(said: list[str], check: Callable[[], None] = lambda: None) -> CheckpointKeeper:
    config = CheckpointConfig(save="ck", save_interval=4, keep_last=2)
    return CheckpointKeeper(config, [], None, None, average=None,  # type: ignore[arg-type]
                            claim=SimpleNamespace(check=check), run_id="run", say=said.append)  # type: ignore[arg-type]


def train(made: CheckpointKeeper, steps: range, last: int = 0) -> None:
    for iteration in steps:
        made.schedule.note_step(iteration, is_applied=True)
        if made.schedule.wants(iteration, is_last=iteration == last):
            made.save(RunProgress(iteration, 0, 0), None, is_needed=iteration == last)  # type: ignore[arg-type]


def test_a_save_that_fails_is_said_and_tried_again_soon(disk: Disk) -> None:
    said: list[str] = []
    made = keeper(said)
    disk.refusals = 2
    train(made, range(1, 10))
    assert [iteration for iteration, _ in disk.attempts] == [4, 5, 7, 8]
    assert said[0] == ("no checkpoint of iteration 4: save=ck: a checkpoint needs 9 GB, 1 GB are free there. The run "
                       "goes on, and tries again after iteration 5")
    assert "again after iteration 7" in said[1] and said[2].startswith("checkpoint saved: ck/iter_0000007")
    assert made.newest_in == "ck" and made.schedule.saved_at == 8


def test_the_last_one_is_tried_several_times_and_then_an_error(disk: Disk) -> None:
    said: list[str] = []
    disk.refusals = NEEDED_ATTEMPTS - 1
    made = keeper(said)
    train(made, range(1, 3), last=2)
    assert made.schedule.saved_at == 2 and "4 more time(s)" in said[0] and said[-1].startswith("checkpoint saved")
    disk.refusals = 99
    with pytest.raises(CheckpointError, match="1 GB are free"):
        train(made, range(3, 4), last=3)
    assert len(disk.attempts) == 2 * NEEDED_ATTEMPTS


def test_older_ones_stay_while_updates_are_left_out(disk: Disk) -> None:
    made = keeper([])
    made.schedule.note_step(1, is_applied=True)
    made.schedule.note_step(2, is_applied=False)
    made.save(RunProgress(2, 0, 0), None, is_needed=True)  # type: ignore[arg-type]
    made.schedule.note_step(3, is_applied=True)
    made.save(RunProgress(3, 0, 0), None, is_needed=True)  # type: ignore[arg-type]
    assert disk.attempts == [(2, 0), (3, 2)]


def test_a_folder_that_is_no_longer_this_runs_is_not_written(disk: Disk, tmp_path: Path) -> None:
    def lost() -> None:
        raise CheckpointError("save=ck is no longer this run's")

    made = keeper([], check=lost)
    made.schedule.note_step(1, is_applied=True)
    with pytest.raises(CheckpointError, match="no longer this run's"):
        made.save(RunProgress(1, 0, 0), None, is_needed=False)  # type: ignore[arg-type]
    assert disk.attempts == []
