"""When a checkpoint is due: only of a state that has taken in an update, never while updates are left out."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsv3_megatron.guards.endings import EXIT_CODE_FILE, tell_launcher
from dsv3_megatron.guards.saves import SaveSchedule


def saved_iterations(steps: str, *, interval: int, loaded: int | None = None, failing: frozenset[int] = frozenset()
                     ) -> list[int]:
    """Iterations saved, the last step's among them, by a run whose steps are applied (a) or left out (-)."""
    schedule, saved = SaveSchedule(interval), []
    iteration = 0
    if loaded is not None:
        iteration = loaded
        schedule.went_back(loaded)
    for number, step in enumerate(steps, start=1):
        iteration += 1
        schedule.note_step(iteration, is_applied=step == "a")
        if schedule.wants(iteration, is_last=number == len(steps)):
            schedule.started(iteration)
            if iteration in failing:
                schedule.failed(iteration)
                continue
            saved.append(iteration)
            schedule.saved()
    return saved


@pytest.mark.parametrize(("steps", "changes", "expected"), [
    ("aaaaaaaaaa", {}, [4, 8, 10]),
    ("aaaaaaaa", {}, [4, 8]),
    ("aaa---aaa-aa", {}, [7, 8, 12]),  # due at 4 and saved at the first applied step after it
    ("aaaaa--", {}, [4, 7]),  # what the fifth step did is kept
    ("----------", {}, []),
    ("----------", {"loaded": 10}, []),
    ("", {"loaded": 10}, []),
    ("------a-", {"loaded": 9}, [16, 17]),  # at 12 and 16 nothing was new
    ("aaaaaaaaa", {"failing": frozenset({4, 5})}, [7, 8, 9]),  # after 1, then after 2 steps
    ("aaaaaaaaaaaaaaaaaaaaaaaa", {"failing": frozenset(range(20))}, [23, 24]),  # after 1, 2, 4, 4, 4 steps: 19, 23
])
def test_what_is_saved(steps: str, changes: dict, expected: list[int]) -> None:
    assert saved_iterations(steps, interval=4, **changes) == expected


def test_a_step_that_falls_due_while_a_checkpoint_is_written_is_not_forgotten() -> None:
    schedule = SaveSchedule(4)
    schedule.note_step(4, is_applied=True)
    schedule.started(4)
    assert not schedule.wants(4, is_last=True)
    for iteration in range(5, 10):
        schedule.note_step(iteration, is_applied=True)
    schedule.saved()
    assert schedule.saved_at == 4 and schedule.wants(9, is_last=False)
    schedule.started(9)
    schedule.note_step(10, is_applied=True)
    assert not schedule.wants(10, is_last=False)
    assert schedule.failed(10) == 11 and not schedule.wants(10, is_last=False) and schedule.wants(11, is_last=False)


def test_after_a_rollback_nothing_is_new() -> None:
    schedule = SaveSchedule(4)
    schedule.note_step(4, is_applied=True)
    schedule.started(4)
    schedule.saved()
    schedule.note_step(5, is_applied=True)
    schedule.went_back(4)
    assert not schedule.wants(4, is_last=True) and not schedule.is_settled
    schedule.note_step(5, is_applied=False)
    assert not schedule.wants(5, is_last=True)


def test_the_first_exit_code_reaches_the_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tell_launcher(4) == 4  # nobody asks
    monkeypatch.setenv(EXIT_CODE_FILE, str(tmp_path / "code"))
    assert (tell_launcher(3), tell_launcher(2)) == (3, 2)
    assert (tmp_path / "code").read_text() == "3\n"
    monkeypatch.setenv(EXIT_CODE_FILE, str(tmp_path / "missing" / "code"))
    assert tell_launcher(3) == 3
