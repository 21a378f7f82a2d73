"""The words of the watchdog: where a rank was, and the summary of all."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from dsv3_megatron.config.guards import REPORT_S, SLOW_FACTOR, UNWATCHED_TIMEOUT_S, GuardConfig
from dsv3_megatron.guards.hang import ALIVE, Watchdog, all_stacks, describe, summary


def state(step: int, part: str, number: int = 1, silence_s: float = 7.0) -> dict:
    return {"step": step, "part": part, "number": number, "silence_s": silence_s}


def test_where_a_rank_was() -> None:
    assert describe(state(3, "optimizer")) == "step 3, optimizer, silent for 7 s"
    assert describe(state(3, "micro-batch", 5)) == "step 3, micro-batch 5, silent for 7 s"


def test_the_summary_begins_with_those_that_are_missing_and_those_behind() -> None:
    states = {0: state(4, "optimizer", silence_s=6.0), 2: state(3, "micro-batch", 2), 3: state(4, "micro-batch")}
    lines = summary("rank 3 had no sign of life for more than 5 s", states, {1: state(3, "reporting")}, 5).splitlines()
    assert lines[0] == ("hang: rank 3 had no sign of life for more than 5 s; 3 of 5 ranks answered. "
                        "Furthest behind first:")
    assert [line.split(":")[0] for line in lines[1:]] == ["  rank 1", "  rank 4", "  rank 2", "  rank 3", "  rank 0"]
    assert "no answer" in lines[1] and "last seen at step 3, reporting" in lines[1]
    assert "no answer" in lines[2] and "last seen" not in lines[2]


def test_a_summary_of_many_ranks_is_short() -> None:
    lines = summary("x", {rank: state(1, "optimizer") for rank in range(2048)}, {}, 2048).splitlines()
    assert len(lines) == 34 and lines[-1] == "  and 2016 more"


def test_stacks_are_those_of_all_threads() -> None:
    assert "test_stacks_are_those_of_all_threads" in all_stacks()


@pytest.mark.parametrize("hang_timeout_s", [1.0, 5.0, 300.0, 7200.0, 1e7])
def test_the_report_comes_before_nccl_ends_the_process(hang_timeout_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank stops in a slow part right after its sign of life; another has waited for it since just after its own."""
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2048)
    watchdog = Watchdog(hang_timeout_s, folder=None)
    watchdog.slow("checkpoint")
    assert watchdog._limit_s() == SLOW_FACTOR * hang_timeout_s
    assert watchdog.patience_s < REPORT_S
    ended_s = hang_timeout_s + watchdog._limit_s() + watchdog.patience_s
    assert GuardConfig(hang_timeout_s=hang_timeout_s).collective_timeout_s > ended_s


def test_without_a_watchdog_messages_wait_as_long_as_in_other_commands() -> None:
    assert GuardConfig(hang_timeout_s=0.0).collective_timeout_s == UNWATCHED_TIMEOUT_S


def test_a_file_says_from_outside_that_a_rank_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                                   ) -> None:
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    monkeypatch.setenv(ALIVE, str(tmp_path))
    monkeypatch.setenv("LOCAL_RANK", "3")
    watchdog = Watchdog(1.0, folder=None)
    file = tmp_path / "rank-3"
    watchdog.start()
    try:
        deadline = time.monotonic() + 10
        while not file.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        watchdog.stop()
    assert not file.exists(), "no rank is at work"
