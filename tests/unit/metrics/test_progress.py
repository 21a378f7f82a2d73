"""Plain lines without a terminal, a bar on one, silence elsewhere."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest

from dsv3_megatron.metrics.flops import RunSpeed
from dsv3_megatron.metrics.progress import Progress, compact, log_line
from dsv3_megatron.metrics.records import StepReport

Make = Callable[..., StepReport]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_come_each_interval_and_at_both_ends(make_report: Make, speed: RunSpeed) -> None:
    stream = io.StringIO()
    progress = Progress(25, speed, log_interval=10, stream=stream)
    for iteration in range(1, 26):
        progress.update(make_report(iteration))
    progress.validation(25, 3.25, mtp_losses=(4.5,))
    progress.close()
    lines = stream.getvalue().splitlines()
    assert [line.split(" |")[0] for line in lines] == [
        "iteration  1/25", "iteration 10/25", "iteration 20/25", "iteration 25/25",
        "validation at iteration 25: lm loss 3.2500"]
    assert lines[-1].endswith("mtp_1 loss 4.5000")


def test_a_step_without_a_counted_token_has_no_loss(make_report: Make, speed: RunSpeed) -> None:
    uncounted = make_report(2, lm_loss=None, mtp_losses=(), skipped=True)
    assert "| no token counted |" in log_line([uncounted], speed, 300)
    before = make_report(1)
    assert f"lm loss {before.lm_loss:.4f}" in log_line([before, uncounted], speed, 300)
    stream = Terminal()
    progress = Progress(25, speed, stream=stream)
    progress.update(uncounted)
    progress.close()
    assert "loss=none" in stream.getvalue()


def test_a_line_averages_its_interval(make_report: Make, speed: RunSpeed) -> None:
    reports = [make_report(1, step_time_s=1.5), make_report(2)]
    line = log_line(reports, speed, 300)
    rates = speed.rates(sum(r.batch_size for r in reports), sum(r.step_time_s for r in reports))
    assert rates.mfu is not None
    assert line == (
        "iteration   2/300 | consumed tokens 8.19k | lm loss 6.0000 | mtp_1 loss 6.7500 | grad norm 0.250 | "
        f"lr 1.000e-03 | batch 16 | tokens/s 4.1k | TFLOP/s {rates.model_flops_per_second / 1e12:.3g} | "
        f"mfu {rates.mfu:.1%} | max-violation 0.25")


def test_skipped_steps_are_counted_and_their_loss_is_not(make_report: Make, speed: RunSpeed) -> None:
    line = log_line([make_report(1), make_report(2, lm_loss=float("nan"), skipped=True)], speed, 300)
    assert "lm loss 8.0000" in line and line.endswith("skipped 1")
    assert "lm loss nan" in log_line([make_report(2, lm_loss=float("nan"), skipped=True)], speed, 300)


def test_bar_on_a_terminal(make_report: Make, speed: RunSpeed) -> None:
    stream = Terminal()
    progress = Progress(20, speed, start_iteration=5, stream=stream)
    for iteration in range(6, 21):
        progress.update(make_report(iteration))
    progress.message("checkpoint saved")
    progress.close()
    text = stream.getvalue()
    assert "20/20" in text and "loss=0.400" in text and "tok/s=8.19k" in text and "gnorm=0.25" in text
    assert "checkpoint saved\n" in text


def test_only_one_process_prints(make_report: Make, speed: RunSpeed) -> None:
    stream = Terminal()
    progress = Progress(20, speed, enabled=False, stream=stream)
    progress.update(make_report(1))
    progress.validation(1, 1.0)
    progress.close()
    assert stream.getvalue() == ""


@pytest.mark.parametrize(("value", "text"), [
    (0.0, "0"), (950, "950"), (999.6, "1k"), (12_345, "12.3k"), (4_560_000, "4.56M"), (999_960_000, "1B"),
    (14.8e12, "14.8T")])
def test_compact(value: float, text: str) -> None:
    assert compact(value) == text
