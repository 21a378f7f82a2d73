"""The command that draws a recorded step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsv3_megatron.commands.draw_schedule import main
from dsv3_megatron.schedule.draw import write_trace
from dsv3_megatron.schedule.plan import build_plan
from dsv3_megatron.schedule.simulate import Costs, simulate


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    plan = build_plan("1f1b", num_ranks=2, num_microbatches=4)
    result = simulate(plan, Costs.uniform(2, forward=1, backward=2, weight=1))
    write_trace(plan, result.timeline, tmp_path / "trace.json")
    return tmp_path / "trace.json"


def test_prints_and_draws(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(trace), "--png", str(trace.with_suffix(".png"))]) == 0
    printed = capsys.readouterr().out
    assert "1f1b: 2 ranks, 2 stages, 4 micro-batches, step 15.0 ms" in printed
    assert "rank 1 waited 3.0 ms, 20.0%" in printed
    assert trace.with_suffix(".png").stat().st_size > 5000


@pytest.mark.parametrize("content", ["not JSON", "{}", '{"otherData": {"schedule": "1f1b"}, "traceEvents": []}'])
def test_another_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    (tmp_path / "other.json").write_text(content)
    assert main([str(tmp_path / "other.json")]) == 2
    assert "other.json is no trace of a schedule as --trace and --trace-schedule write it" in capsys.readouterr().err


def test_a_trace_of_other_actions_is_refused(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads(trace.read_text())
    next(event for event in content["traceEvents"] if event["ph"] == "X")["name"] = "F0.9"
    trace.write_text(json.dumps(content))
    assert main([str(trace)]) == 2
    assert "it has F0.9 where the plan has F0.0" in capsys.readouterr().err


@pytest.mark.parametrize(("field", "value", "message"), [
    ("dur", 0, "holds no action that takes time"), ("dur", float("nan"), "dur=nan; both must be finite numbers"),
    ("ts", float("inf"), "ts=inf"), ("ts", "soon", "ts='soon'"), ("dur", None, "dur=None"), ("dur", -1, "dur=-1"),
    ("dur", 10 ** 400, "no trace of a schedule"), ("ts", 0, "before it has ended"), ("tid", 7, "no trace"),
])
def test_times_that_cannot_be_are_refused(trace: Path, capsys: pytest.CaptureFixture[str], field: str, value: object,
                                          message: str) -> None:
    content = json.loads(trace.read_text())
    for event in content["traceEvents"]:
        if event["ph"] == "X":
            event[field] = value
    trace.write_text(json.dumps(content))
    assert main([str(trace)]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.out == ""


@pytest.mark.parametrize("name", ["num_ranks", "num_microbatches", "virtual_stages"])
def test_sizes_that_the_events_do_not_fill_are_refused_at_once(trace: Path, name: str) -> None:
    content = json.loads(trace.read_text())
    content["otherData"][name] = 10 ** 9
    trace.write_text(json.dumps(content))
    assert main([str(trace)]) == 2


def test_a_missing_folder_is_told_before_the_trace_is_read(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(trace), "--png", str(trace.parent / "none" / "a.png")]) == 2
    printed = capsys.readouterr()
    assert "none does not exist; make it first" in printed.err and printed.out == ""
