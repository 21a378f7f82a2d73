"""Plain lines without a terminal, a bar on one, silence elsewhere."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from datetime import datetime

import pytest

from dsv3_megatron.metrics.flops import RunSpeed
from dsv3_megatron.metrics.progress import TrainingDisplay, compact, duration, log_line
from dsv3_megatron.metrics.run_records import StepReport
from dsv3_megatron.metrics.tags import TAGS

Make = Callable[..., StepReport]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_come_each_interval_and_at_both_ends(make_report: Make, speed: RunSpeed) -> None:
    stream = io.StringIO()
    progress = TrainingDisplay(25, speed, log_interval=10, stream=stream)
    for iteration in range(1, 26):
        progress.update(make_report(iteration))
    progress.validation(25, 3.25, mtp_losses=(4.5,))
    progress.close()
    lines = stream.getvalue().splitlines()
    assert [re.sub(r"^\[[-0-9]{10} [:0-9]{8}\] ", "", line.split(" |")[0]) for line in lines] == [
        "iteration  1/25", "iteration 10/25", "iteration 20/25", "iteration 25/25",
        "validation at iteration 25: lm loss 3.2500"]
    assert lines[-1].endswith("mtp_1 loss 4.5000")


def test_a_step_without_a_counted_token_has_no_loss(make_report: Make, speed: RunSpeed) -> None:
    uncounted = make_report(2, lm_loss=None, mtp_losses=(), skipped=True)
    assert "| no token counted |" in log_line([uncounted], speed, 300)
    before = make_report(1)
    assert f"lm loss {before.lm_loss:.4f}" in log_line([before, uncounted], speed, 300)
    stream = Terminal()
    progress = TrainingDisplay(25, speed, stream=stream)
    progress.update(uncounted)
    progress.close()
    assert "loss=none" in stream.getvalue()


def test_a_line_averages_its_interval(make_report: Make, speed: RunSpeed) -> None:
    reports = [make_report(1, step_time_s=1.5), make_report(2)]
    line = log_line(reports, speed, 300)
    rates = speed.rates(sum(r.batch_size for r in reports), sum(r.step_time_s for r in reports))
    assert rates.mfu is not None
    assert line == (
        "iteration   2/300 | consumed tokens 8.19k | mean lm loss 6.0000 | mean mtp_1 loss 6.7500 | grad norm 0.250 | "
        f"lr 1.000e-03 | batch 16 | tokens/s 4.1k | TFLOP/s {rates.model_flops_per_second / 1e12:.3g} | "
        f"mfu {rates.mfu:.1%} | max-violation 0.25")


def test_skipped_steps_are_counted_and_their_loss_is_not(make_report: Make, speed: RunSpeed) -> None:
    line = log_line([make_report(1), make_report(2, lm_loss=float("nan"), skipped=True)], speed, 300)
    assert "lm loss 8.0000" in line and line.endswith("skipped 1")
    assert "lm loss nan" in log_line([make_report(2, lm_loss=float("nan"), skipped=True)], speed, 300)


def test_bar_on_a_terminal(make_report: Make, speed: RunSpeed) -> None:
    stream = Terminal()
    progress = TrainingDisplay(20, speed, start_iteration=5, stream=stream)
    for iteration in range(6, 21):
        progress.update(make_report(iteration))
    progress.message("checkpoint saved")
    progress.close()
    text = stream.getvalue()
    assert "20/20" in text and "loss=0.400" in text and "tok/s=8.19k" in text and "gnorm=0.25" in text
    assert "checkpoint saved\n" in text


def test_only_one_process_prints(make_report: Make, speed: RunSpeed) -> None:
    stream = Terminal()
    progress = TrainingDisplay(20, speed, enabled=False, stream=stream)
    progress.update(make_report(1))
    progress.validation(1, 1.0)
    progress.close()
    assert stream.getvalue() == ""


@pytest.mark.parametrize(("value", "text"), [
    (0.0, "0"), (950, "950"), (999.6, "1k"), (12_345, "12.3k"), (4_560_000, "4.56M"), (999_960_000, "1B"),
    (14.8e12, "14.8T")])
def test_compact(value: float, text: str) -> None:
    assert compact(value) == text


def test_a_line_has_the_time_of_day_and_what_was_and_will_be_needed(make_report: Make, speed: RunSpeed) -> None:
    """Two seconds a step; a validation of a minute after step 10 counts for the steps of its line."""
    stream, seconds = io.StringIO(), [100.0]
    progress = TrainingDisplay(40, speed, start_iteration=5, log_interval=10, stream=stream, clock=lambda: seconds[0],
                               now=lambda: datetime(2026, 1, 2, 3, 4, 5))
    for iteration in range(6, 41):
        seconds[0] += 2.0
        progress.update(make_report(iteration))
        if iteration == 10:
            seconds[0] += 60.0
    lines = stream.getvalue().splitlines()
    assert all(line.startswith("[2026-01-02 03:04:05] iteration ") for line in lines)
    assert [line[line.index("| elapsed"):] for line in lines] == [
        "| elapsed 0:00:10 | remaining 0:01:00", "| elapsed 0:01:30 | remaining 0:02:40",
        "| elapsed 0:01:50 | remaining 0:00:20", "| elapsed 0:02:10 | remaining 0:00:00"]


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00:00"), (59.6, "0:01:00"), (3600, "1:00:00"),
                                               (86399.4, "23:59:59"), (86400, "1d 00:00:00"), (360000, "4d 04:00:00")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_mean_over_steps_is_not_called_as_tensorboard_s_value_of_one_step(make_report: Make, speed: RunSpeed) -> None:
    shown = {re.sub(r" [-+.0-9e%kMBT/]+$", "", field.strip())
             for field in log_line([make_report(1), make_report(2)], speed, 300).split("|")}
    means = {field for field in shown if "loss" in field}
    assert means == {"mean lm loss", "mean mtp_1 loss"} and not means & {tag.name for tag in TAGS}
