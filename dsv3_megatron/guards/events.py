"""What the guards found, for people: log lines, a line each in guards.jsonl, and the report of a run that was ended.

The process that is enabled writes; the others hold the same events and write nothing. guards.jsonl is only ever added
to, so that it still tells of steps that a rollback takes back.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dsv3_megatron.checkpoint.folder import TRACKER, latest_iteration, saved_iterations
from dsv3_megatron.guards.decisions import Guard
from dsv3_megatron.guards.endings import mark_ended
from dsv3_megatron.metrics.kept_file import KeptFile, KeptText
from dsv3_megatron.metrics.run_records import to_line

GUARDS_FILE, REPORT_FILE = "guards.jsonl", "guards-report.txt"
# Values of the window in a report: enough to see where it was heading.
_NUM_SHOWN = 16

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Event:
    """A step that a guard fired at.

    Attributes:
        iteration: Number of the step, counted from 1.
        kind: "nonfinite", "spike" or "uncounted".
        action: "logged", "skipped", "rolled back" or "ended the run".
        reasons: What was found, with values.
        samples: First and last of the dataset's samples in the step, over all data-parallel ranks.
        sources: Places that the fault came from, as far as ranks know: micro-batches by their samples, gradients by
            name.
        lm_loss: Next-token loss of the step; None where no token of it counts.
        grad_norm: Norm of the step's gradient, before clipping.
    """

    iteration: int
    kind: str
    action: str
    reasons: tuple[str, ...]
    samples: tuple[int, int]
    sources: tuple[str, ...]
    lm_loss: float | None
    grad_norm: float

    def __str__(self) -> str:
        where = f"; {'; '.join(self.sources)}" if self.sources else ""
        return (f"iteration {self.iteration}: {', '.join(self.reasons)}: {self.action}; samples {self.samples[0]} to "
                f"{self.samples[1]} of the training data{where}")


class EventLog:
    """Events of a run. Where not enabled, nothing is written.

    Args:
        folder: Folder for guards.jsonl and the report; None: log lines only.
        enabled: True on exactly one process.
    """

    def __init__(self, folder: str | None, *, enabled: bool) -> None:
        self._folder = Path(folder) if folder and enabled else None
        self._file = KeptFile(self._folder / GUARDS_FILE, has_lines=True) if self._folder is not None else None
        self._enabled = enabled
        self.events: list[Event] = []

    def write(self, event: Event) -> None:
        """Log an event and add it to guards.jsonl."""
        self.events.append(event)
        if self._enabled:
            logger.warning("%s", event)
        if self._file is not None:
            self._file.append(to_line(dataclasses.asdict(event)).encode())
            self._file.flush()

    def flush(self) -> None:
        """Try again what could not be written to guards.jsonl."""
        if self._file is not None:
            self._file.flush()

    def finish(self, guard: Guard, save: str | None) -> None:
        """Let guards.jsonl go. If a guard ends the run, write why to stderr, beside the checkpoints, and to
        guards-report.txt if there is a folder.

        Args:
            guard: Guard of the run.
            save: Folder of the run's checkpoints.
        """
        if self._file is not None:
            self._file.close()
        if not self._enabled or not guard.end_reason:
            return
        text = report(guard, self.events, save)
        logger.error("%s", text)
        if save is not None:
            mark_ended(save, text)
        if self._folder is not None:
            KeptText(self._folder / REPORT_FILE).write(text + "\n")


def report(guard: Guard, events: Sequence[Event], save: str | None) -> str:
    """Why a run was ended: what fired, with values, samples and the window it was judged by."""
    counters, config = guard.counters, guard.config
    lines = [f"the guards end this run: {guard.end_reason}", "",
             f"in all: {counters.skipped} updates left out, {counters.spikes} spikes, {counters.rollbacks} rollbacks "
             f"(on_spike={config.on_spike})"]
    if counters.jumps:
        lines.append("samples that rollbacks jumped over: "
                     + ", ".join(f"{first} to {stop - 1}" for first, stop in counters.jumps))
    lines += ["", "what fired, the last of this process's run at the end:"]
    lines += [f"  {event}" for event in events[-_NUM_SHOWN:]]
    window = guard.detector.window
    lines += ["", f"the window: {len(window)} good steps (spike_window={config.spike_window}), its last:",
              "  lm loss    " + " ".join(f"{loss:.4g}" for loss, _ in window[-_NUM_SHOWN:]),
              "  grad norm  " + " ".join(f"{norm:.4g}" for _, norm in window[-_NUM_SHOWN:]),
              "", _way_out(guard, save)]
    return "\n".join(lines)


def _way_out(guard: Guard, save: str | None) -> str:
    if save is None:
        return "Nothing was saved: save is not set."
    newest = latest_iteration(save)
    if newest is None:
        return f"Nothing was saved in {save}."
    kept = f"Nothing was saved of this end: the newest checkpoint in {save} is that of iteration {newest}. "
    if guard.config.on_spike == "rollback" and not guard.counters.consecutive_skips:
        return kept + ("It is the last one before the spikes. Resume with --on-spike skip or log, with a lower "
                       "learning rate, or with more --max-rollbacks.")
    earlier = [iteration for iteration in saved_iterations(save) if iteration < newest]
    back = f"go back to an earlier one (write {earlier[-1]} into {Path(save) / TRACKER})" if earlier \
        else "there is no earlier one to go back to"
    return kept + f"If a resumed run ends the same way, {back}, or look at the samples above."
