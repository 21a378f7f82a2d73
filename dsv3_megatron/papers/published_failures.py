"""Training runs of others whose failures were published, and what the planner makes of them.

Nothing of the planner was fitted to them. Of no run everything is published: seconds of a save or of a restart are then
those that another publication gives for a job of that kind, and `taken` says so. The last column of the table is what
the answer hangs on most: the restart with which the planner would say what was published.

Usage:
    for run in PUBLISHED_FAILURES:
        run.predicted, run.published, run.explaining_restart_seconds
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dsv3_megatron.planning.goodput.failures import Failures, best_interval, time_shares

_HOUR, _DAY = 3600.0, 86400.0
LLAMA, MEGASCALE = "https://arxiv.org/abs/2407.21783", "https://arxiv.org/abs/2402.15627"
BYTE_CHECKPOINT, RELIABILITY = "https://arxiv.org/abs/2407.20143", "https://arxiv.org/abs/2410.21680"
BLOOM = "https://huggingface.co/blog/bloom-megatron-deepspeed"

# ByteCheckpoint, table 8: a model of 405B on 8,960 GPUs waits, has it written, and loads it.
_SAVE_S, _WRITE_S, _LOAD_S = 0.59, 51.06, 129.49
# MegaScale: diagnosis in less than 10 minutes (section 6.3), groups of 10,000 GPUs in less than 30 s (section 3.5).
_FIND_S, _MEET_S = 600.0, 30.0
_RESTART_S = _FIND_S + _MEET_S + _LOAD_S
_TAKEN = "save and load of ByteCheckpoint's 405B, finding and meeting of MegaScale"
# RSC-1: 6.50 failures in 1,000 days of a node of 8 GPUs.
RSC1_HOURS_PER_GPU = 8 * 24 / 6.50e-3


@dataclass(frozen=True)
class PublishedFailures:
    """A run whose failures were published.

    Attributes:
        name: Name of the run.
        address: Page that has the numbers.
        failures: How often it stopped, published, and what that cost.
        published: Share of time that counted, as published.
        is_lower_bound: Whether the share is one that was exceeded.
        taken: What was not published, and what was taken for it.
        interval_seconds: Seconds between saves, where they were published; None: the best.
        note: What the published share has that the planner does not know.
    """

    name: str
    address: str
    failures: Failures
    published: float
    is_lower_bound: bool
    taken: str
    interval_seconds: float | None = None
    note: str = ""

    @property
    def interval(self) -> float:
        """Seconds of training between saves that the answer is for."""
        return self.interval_seconds or best_interval(self.failures)

    @property
    def predicted(self) -> float:
        """Share of time that counts, by the planner."""
        return time_shares(self.failures, self.interval).training

    @property
    def explaining_restart_seconds(self) -> float:
        """Seconds of a restart with which the planner's share would be the published one."""
        failures = self.failures
        return failures.restart_seconds + math.log(self.predicted / self.published) * failures.seconds_between


def _job(num_gpus: int, seconds_between: float, save_s: float, restart_s: float, write_s: float = 0.0) -> Failures:
    return Failures(seconds_between * num_gpus / _HOUR, num_gpus, save_s, restart_s, write_s)


PUBLISHED_FAILURES = (
    PublishedFailures(
        "Llama 3 405B: 466 interruptions in 54 days", LLAMA,
        _job(16384, 54 * _DAY / 466, _SAVE_S, _RESTART_S, _WRITE_S), 0.90, True, _TAKEN),
    PublishedFailures(
        "the same, 419 of them unexpected", LLAMA,
        _job(16384, 54 * _DAY / 419, _SAVE_S, _RESTART_S, _WRITE_S), 0.90, True, _TAKEN),
    PublishedFailures(
        "MegaScale: over 100 restarts in several weeks", MEGASCALE,
        _job(12288, 21 * _DAY / 100, _SAVE_S, _RESTART_S, _WRITE_S), 0.90, True,
        "three weeks, 12,288 GPUs (the paper's largest), loading of ByteCheckpoint; saves so that a loss is 15 min",
        interval_seconds=15 * 60),
    PublishedFailures(
        "BLOOM: 1 to 2 failures a week", BLOOM, _job(384, 7 * _DAY / 1.5, 40.0, 1800.0),
        366e9 / (2048 * 2048) * 3 * _HOUR / 100 * 384 / (1_082_990 * _HOUR), False,
        "saves of 40 s, restarts of 30 min; the share from tokens, steps of 108 s and GPU-hours of its paper",
        interval_seconds=3 * _HOUR, note="several stops of 5 to 10 h for other reasons"),
)
