"""Shows a run's progress: a bar on a terminal, one plain line per log interval where there is none.

Usage (every process makes one; only the enabled one prints):
    progress = Progress(train_iters, speed, start_iteration=0, log_interval=10, enabled=rank == 0)
    progress.update(report)                     # after every step
    progress.validation(iteration, lm_loss)
    progress.message("checkpoint saved: ...")   # a line that does not break the bar
    progress.close()
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, TextIO

from dsv3_megatron.config.slow_work import bar_width
from dsv3_megatron.metrics.balance import max_violation
from dsv3_megatron.metrics.flops import RunSpeed
from dsv3_megatron.metrics.run_records import StepReport

# Of what GRPO reports, what a line has room for.
_SHOWN_EXTRAS = ("grpo/reward", "grpo/length")


def compact(value: float, digits: int = 3) -> str:
    """A number to three digits, or more, with its magnitude: 950, 12.3k, 4.56M, 7.89B, 1.2T."""
    for factor, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * factor:
            return f"{value / factor:.{digits}g}{suffix}"
    return f"{value:.{digits}g}"


def log_line(reports: Sequence[StepReport], speed: RunSpeed, train_iters: int) -> str:
    """One line on the steps since the last one: losses and speed averaged over them, the rest of the last.

    TensorBoard's `lm loss` is that of one step; a mean is called one here.

    Args:
        reports: Steps since the last line, at least one, in order. Losses of skipped steps do not count.
        speed: Turns times into rates.
        train_iters: Steps of the whole run.
    """
    last = reports[-1]
    known = [report for report in reports if report.lm_loss is not None]
    counted = [report for report in known if not report.skipped] or known[-1:]
    rates = speed.rates(sum(report.batch_size for report in reports), sum(report.step_time_s for report in reports))
    width = len(str(train_iters))
    fields = [
        f"iteration {last.iteration:{width}d}/{train_iters}",
        f"consumed tokens {compact(last.consumed_tokens)}",
        f"mean lm loss {sum(r.lm_loss or 0.0 for r in counted) / len(counted):.4f}" if counted else "no token counted",
    ]
    for depth in range(len(counted[-1].mtp_losses) if counted else 0):
        fields.append(f"mean mtp_{depth + 1} loss {sum(r.mtp_losses[depth] for r in counted) / len(counted):.4f}")
    fields += [
        f"grad norm {last.grad_norm:.3f}",
        f"lr {last.learning_rate:.3e}",
        f"batch {last.batch_size}",
        *([f"phase {last.phase}"] if last.phase else []),
        f"tokens/s {compact(rates.tokens_per_second)}",
        f"TFLOP/s {rates.model_flops_per_second / 1e12:.3g}",
    ]
    if rates.mfu is not None:
        fields.append(f"mfu {rates.mfu:.1%}")
    if last.expert_load:
        fields.append(f"max-violation {_mean_violation(last):.2f}")
    fields += [f"{name.rpartition('/')[2]} {value:.3g}" for name, value in last.extras.items() if name in _SHOWN_EXTRAS]
    num_skipped = sum(report.skipped for report in reports)
    if num_skipped:
        fields.append(f"skipped {num_skipped}")
    return " | ".join(fields)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, and days if there are any: 0:01:23, 2d 03:04:05."""
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours}:{minutes:02d}:{left:02d}"
    return f"{hours // 24}d {hours % 24:02d}:{minutes:02d}:{left:02d}"


def _mean_violation(report: StepReport) -> float:
    return sum(max_violation(counts) for counts in report.expert_load.values()) / len(report.expert_load)


class TrainingDisplay:
    """Progress of one run on one stream. Where not enabled, every method does nothing.

    Args:
        train_iters: Steps of the whole run.
        speed: Turns step times into rates.
        start_iteration: Steps already taken when the run resumes.
        log_interval: Steps between plain lines.
        enabled: True on exactly one process.
        stream: Stream to write to; sys.stderr by default. A bar if it is a terminal, lines otherwise.
        clock: Seconds since any moment.
        now: Date and time, for the beginning of a line.
    """

    def __init__(self, train_iters: int, speed: RunSpeed, *, start_iteration: int = 0, log_interval: int = 10,
                 enabled: bool = True, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic,
                 now: Callable[[], datetime] = datetime.now) -> None:
        self._train_iters = train_iters
        self._speed = speed
        self._log_interval = log_interval
        self._enabled = enabled
        self._stream = sys.stderr if stream is None else stream
        self._since_line: list[StepReport] = []
        self._clock, self._now = clock, now
        self._started = self._last_line = clock()
        self._num_skipped = 0
        self._bar: Any = None
        if enabled and self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=train_iters, initial=start_iteration, file=self._stream, unit="step",
                             **bar_width(self._stream), smoothing=0.1)

    def update(self, report: StepReport) -> None:
        """Count one step; prints a line at every log_interval-th one, the first and the last."""
        if not self._enabled:
            return
        self._num_skipped += report.skipped
        if self._bar is not None:
            self._update_bar(report)
            return
        self._since_line.append(report)
        if report.iteration % self._log_interval == 0 or report.iteration in (1, self._train_iters):
            self._print_line()

    def change_speed(self, speed: RunSpeed) -> None:
        """Turn the times of the steps from here on into rates with another sequence length."""
        if self._since_line:
            self._print_line()
        self._speed = speed

    def _print_line(self) -> None:
        """A line with the time of day, and what this process's steps took and the others will, at the pace of these."""
        time_now = self._clock()
        last = self._since_line[-1].iteration
        pace = (time_now - self._last_line) / len(self._since_line)
        self._last_line = time_now
        self._print(f"[{self._now():%Y-%m-%d %H:%M:%S}] {log_line(self._since_line, self._speed, self._train_iters)} | "
                    f"elapsed {duration(time_now - self._started)} | "
                    f"remaining {duration(max(0, self._train_iters - last) * pace)}")
        self._since_line.clear()

    def _update_bar(self, report: StepReport) -> None:
        rates = self._speed.rates(report.batch_size, report.step_time_s)
        loss = "none" if report.lm_loss is None else f"{report.lm_loss:.3f}"
        shown = {"loss": loss, "tok/s": compact(rates.tokens_per_second),
                 "gnorm": f"{report.grad_norm:.2f}"}
        if report.phase:
            shown |= {"phase": report.phase, "lr": f"{report.learning_rate:.2e}", "batch": str(report.batch_size)}
        if report.expert_load:
            shown["maxvio"] = f"{_mean_violation(report):.2f}"
        if rates.mfu is not None:
            shown["mfu"] = f"{rates.mfu:.1%}"
        if self._num_skipped:
            shown["skipped"] = str(self._num_skipped)
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(1)

    def validation(self, iteration: int, lm_loss: float, *, mtp_losses: Sequence[float] = (), name: str = "") -> None:
        """Print the loss on the validation data, or on the set of that name, in nats per token."""
        parts = [f"validation{name and ' ' + name} at iteration {iteration}: lm loss {lm_loss:.4f}"]
        parts += [f"mtp_{depth} loss {loss:.4f}" for depth, loss in enumerate(mtp_losses, start=1)]
        self.message(" | ".join(parts))

    def message(self, text: str) -> None:
        """Print a line above the bar."""
        if self._enabled:
            self._print(text)

    def close(self) -> None:
        """End the bar where it stands; may be called twice."""
        if self._bar is not None:
            self._bar.close()

    def _print(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)
