"""Counts of a rehearsal's report, and the file that has them before and after a change."""

from __future__ import annotations

import csv
import json
import subprocess
from pathlib import Path

import pytest

from tools.bench.bench_rehearsed_step import quantities, rehearse, write

RANK = {
    "waits": [{"what": "for an event", "line": "model/token_dispatcher.py:107", "count": 96},
              {"what": "a number is read", "line": "optim/update.py:28", "count": 8},
              {"what": "a number is read", "line": "runs/trainer.py:267", "count": 1}],
    "copies": [{"what": "device to host", "line": "model/token_dispatcher.py:66", "count": 5}],
    "launches": {"mm": 7, "copy_": 3},
    "messages": [
        {"operation": "all_to_all", "dtype": "uint8", "group": "the group of 64 ranks (256, 257, ... 319)", "count": 4,
         "mean_bytes": 10.5},
        {"operation": "all_reduce", "dtype": "int64", "group": "the group of 2048 ranks (0, 1, ... 2047)", "count": 2,
         "mean_bytes": 8.0},
        {"operation": "all_reduce", "dtype": "int32", "group": "the group of 2 ranks (0, 1, number 2 of these)",
         "count": 1, "mean_bytes": 4.0}],
    "peak_bytes": 123,
}


def test_counts_of_a_report() -> None:
    assert quantities(RANK) == {
        "host waits": 105, "host waits in experts' layers": 96, "host waits for the gradient's norm": 8,
        "copies without waiting": 5, "kernels started, at least": 10, "messages": 7, "all-to-alls of tokens": 4,
        "bytes of all-to-alls": 42, "all-reduces of the whole run": 2, "peak bytes": 123}


def test_what_was_before_stays(tmp_path: Path) -> None:
    path = tmp_path / "results" / "rehearsed_step.csv"
    write(path, "one", {"host waits": 9, "messages": 3}, {"host waits": 10, "messages": 3})
    write(path, "two", {"host waits": 1}, None)
    write(path, "one", {"host waits": 8, "messages": 2}, None)
    with path.open(newline="", encoding="utf-8") as file:
        rows = [(row["setting"], row["quantity"], row["before"], row["after"]) for row in csv.DictReader(file)]
    assert rows == [("two", "host waits", "", "1"), ("one", "host waits", "10", "8"), ("one", "messages", "3", "2")]


def test_a_rehearsal_that_ended_in_an_error_gives_no_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    report = {"ranks": [{**RANK, "rank": 300, "failed_in": "step", "failure": "ValueError: no"}]}
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(
        command, 1, json.dumps(report), ""))
    with pytest.raises(RuntimeError, match="rank 300 in step: ValueError: no"):
        rehearse([])
    report["ranks"][0]["failure"] = None
    assert rehearse([]) == report
