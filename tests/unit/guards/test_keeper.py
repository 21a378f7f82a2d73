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
    """Stands for the checkpoint's writer; refuses so many times, at once or when the save is waited for.

    Attributes:
        attempts: Iteration of each save, and the checkpoints to keep.
        behind: Iterations of those that are written while training goes on.
        steps: Looks at a save under way until it is over.
    """

    def __init__(self) -> None:
        self.refusals = self.late_refusals = self.steps = 0
        self.attempts: list[tuple[int, int]] = []
        self.behind: list[int] = []
        self.under_way = 0

    def start(self, _save: str, progress: RunProgress, *_: Any, keep_last: int, background: Any, **__: Any) -> Save:
        assert not self.under_way, "one save at a time"
        self.attempts.append((progress.iteration, keep_last))
        if self.refusals:
            self.refusals -= 1
            raise CheckpointError("save=ck: a checkpoint needs 9 GB, 1 GB are free there")
        if background is not None:
            self.behind.append(progress.iteration)
        self.under_way += 1
        return Save(self, progress.iteration)


class Save:
    """Stands for a save under way."""

    def __init__(self, disk: Disk, iteration: int) -> None:
        self._disk, self.iteration, self._looks = disk, iteration, 0

    def is_over(self) -> bool:
        self._looks += 1
        return self._looks > self._disk.steps

    def finish(self) -> Path:
        self._disk.under_way -= 1
        if self._disk.late_refusals:
            self._disk.late_refusals -= 1
            raise CheckpointError("process 1: No space left on device")
        return Path("ck") / f"iter_{self.iteration:07d}"


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk()
    monkeypatch.setattr(module, "start_checkpoint", disk.start)
    monkeypatch.setattr(module, "on_first_rank", lambda action, _subject: action())
    monkeypatch.setattr(module.time, "sleep", lambda _seconds: None)
    return disk


def keeper(said: list[str], check: Callable[[], None] = lambda: None, **changes: Any) -> CheckpointKeeper:
    config = CheckpointConfig(save="ck", save_interval=4, **{"keep_last": 2, "async_save": False, **changes})
    return CheckpointKeeper(config, [], None, None, average=None,  # type: ignore[arg-type]
                            claim=SimpleNamespace(check=check), run_id="run", say=said.append)  # type: ignore[arg-type]


def train(made: CheckpointKeeper, steps: range, last: int = 0) -> None:
    for iteration in steps:
        made.schedule.note_step(iteration, is_applied=True)
        made.look(iteration)
        if iteration == last:
            made.finish(iteration)
        if made.schedule.wants(iteration, is_last=iteration == last):
            made.save(RunProgress(iteration, 0, 0), None, is_needed=iteration == last)  # type: ignore[arg-type]


def test_a_save_that_fails_is_said_and_tried_again_soon(disk: Disk) -> None:
    said: list[str] = []
    made = keeper(said)
    disk.refusals = 2
    train(made, range(1, 10))
    assert [iteration for iteration, _ in disk.attempts] == [4, 5, 7, 8]
    assert said[0] == ("no checkpoint of iteration 4: save=ck: a checkpoint needs 9 GB, 1 GB are free there. That is "
                       "1 in a row, of 16 that may fail. The run goes on, and tries again after iteration 5")
    assert "again after iteration 7" in said[1] and said[2].startswith("checkpoint saved: ck/iter_0000007")
    assert made.newest_in == "ck" and made.schedule.saved_at == 8


def test_more_in_a_row_than_may_fail_end_the_run(disk: Disk) -> None:
    said: list[str] = []
    made = keeper(said, max_failed_saves=2)
    disk.refusals = 2
    train(made, range(1, 9))
    assert made.schedule.saved_at == 8 and made.schedule.num_failures == 0, "one that is written begins the count anew"
    disk.refusals = 3
    with pytest.raises(CheckpointError, match="3 in a row, more than max_failed_saves=2: the run ends"):
        train(made, range(9, 20))
    assert [iteration for iteration, _ in disk.attempts] == [4, 5, 7, 8, 12, 13, 15]
    endless = keeper(said, max_failed_saves=0)
    disk.refusals = 50
    train(endless, range(1, 150))
    assert disk.refusals < 20 and "That is 30 in a row. The run goes on" in "".join(said)


def test_training_goes_on_while_a_checkpoint_is_written(disk: Disk) -> None:
    """It counts as saved when it is; the next one waits for it, and so does the last, which is then waited for."""
    said: list[str] = []
    made = keeper(said, async_save=True)
    disk.steps = 2
    train(made, range(1, 7))
    assert disk.behind == [4] and made.schedule.saved_at is None and made.newest_in is None and not said
    train(made, range(7, 8))
    assert made.schedule.saved_at == 4 and made.newest_in == "ck" and said == ["checkpoint saved: ck/iter_0000004"]
    disk.steps = 99
    train(made, range(8, 14))
    assert disk.behind == [4, 8, 12] and made.schedule.saved_at == 8, "the save of 12 has waited for that of 8"
    train(made, range(14, 15), last=14)
    assert disk.behind == [4, 8, 12] and disk.attempts[-1] == (14, 2) and made.schedule.saved_at == 14
    assert said[1:] == [f"checkpoint saved: ck/iter_{iteration:07d}" for iteration in (8, 12, 14)]
    made.close()


def test_a_run_that_ends_while_its_last_state_is_written_saves_it_once(disk: Disk) -> None:
    made = keeper([], async_save=True)
    disk.steps = 99
    train(made, range(1, 5))
    assert not made.wants(4, is_last=True), "it is under way"
    made.finish(4)
    assert disk.attempts == [(4, 2)] and made.schedule.saved_at == 4 and not made.wants(4, is_last=True)
    disk.late_refusals = 1
    train(made, range(5, 9))
    made.finish(8)
    assert made.wants(8, is_last=True), "it was not written"
    made.close()


def test_a_save_that_fails_while_training_goes_on_is_tried_again(disk: Disk) -> None:
    said: list[str] = []
    made = keeper(said, async_save=True, max_failed_saves=1)
    disk.steps, disk.late_refusals = 2, 1
    train(made, range(1, 12))
    assert said[0] == ("no checkpoint of iteration 4: process 1: No space left on device. That is 1 in a row, of 1 "
                       "that may fail. The run goes on, and tries again after iteration 8")
    assert disk.behind == [4, 8] and made.schedule.saved_at == 8
    disk.late_refusals = 2
    with pytest.raises(CheckpointError, match="no checkpoint of iteration 16: .* 2 in a row"):
        train(made, range(12, 24))
    assert disk.behind == [4, 8, 12, 16]
    made.close()


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
