"""A job with failures, event by event, drawn at random: what the closed form of failures.py is held against.

Nothing of that formula is used. Every save, failure, start and repair is an event on a clock.
"""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass

from dsv3_megatron.planning.goodput.failures import Failures

_FAILURE, _STARTED, _INTERVAL, _SAVED, _ON_DISK, _REPAIRED = range(6)


@dataclass(frozen=True)
class DrawnRun:
    """How one run went.

    Attributes:
        seconds: Time from its first start to its end.
        num_failures: Failures in that time.
        num_events: Events that were looked at.
    """

    seconds: float
    num_failures: int
    num_events: int


class _Job:
    """The state of a job; events of before a failure are told by an older `start`."""

    def __init__(self, failures: Failures, interval: float, work: float, random_numbers: random.Random) -> None:
        self.failures, self.interval, self.work, self.random = failures, interval, work, random_numbers
        self.now = 0.0
        self.start = 0  # number of the start under way
        self.in_repair = 0
        self.num_failures = self.num_events = 0
        self.trained = self.on_disk = 0.0  # seconds of training, of this start and as the last save on disk has it
        self.queue: list[tuple[float, int, int, int, float]] = []
        self.count = 0
        self.is_waiting = False

    def post(self, delay: float, kind: int, value: float = 0.0) -> None:
        """Put an event on the clock."""
        self.count += 1
        heapq.heappush(self.queue, (self.now + delay, self.count, kind, self.start, value))

    def begin(self, delay: float) -> None:
        """Start (again) after `delay` seconds; failures are possible from now on."""
        self.start += 1
        self.trained = self.on_disk
        self.post(delay, _STARTED)
        self.post(self.random.expovariate(1 / self.failures.seconds_between), _FAILURE)

    def train(self) -> None:
        """Train to the next save, or to the end."""
        self.post(min(self.interval, self.work - self.trained), _INTERVAL)

    def run(self) -> DrawnRun:
        """Live through the events up to the end of the work."""
        self.begin(0.0)
        while True:
            self.now, _, kind, start, value = heapq.heappop(self.queue)
            if kind == _REPAIRED:
                self.in_repair -= 1
                if self.is_waiting:
                    self.is_waiting = False
                    self.begin(self.failures.restart_seconds)
                continue
            if start != self.start or self.is_waiting:
                continue
            self.num_events += 1
            if kind == _FAILURE:
                self.fail()
            elif kind == _STARTED or kind == _SAVED:
                if kind == _SAVED:
                    self.post(self.failures.write_seconds, _ON_DISK, self.trained)
                self.train()
            elif kind == _ON_DISK:
                self.on_disk = value
            else:
                self.trained = min(self.trained + self.interval, self.work)
                if self.trained >= self.work:
                    return DrawnRun(self.now, self.num_failures, self.num_events)
                self.post(self.failures.save_seconds, _SAVED)

    def fail(self) -> None:
        """Lose a node, and start again if there is another."""
        self.num_failures += 1
        spares = self.failures.spares
        if spares is not None:
            self.in_repair += 1
            self.post(self.random.expovariate(1 / (self.failures.repair_hours * 3600)), _REPAIRED)
            if self.in_repair > spares:
                self.is_waiting = True
                return
        self.begin(self.failures.restart_seconds)


def draw_run(failures: Failures, interval_seconds: float, work_seconds: float, seed: int) -> DrawnRun:
    """Draw how a job with failures goes, from its first start to the end of its work.

    Args:
        failures: The job.
        interval_seconds: Seconds of training between two saves.
        work_seconds: Seconds of training that the run needs without failures or saves.
        seed: Seed of the random numbers.
    """
    return _Job(failures, interval_seconds, work_seconds, random.Random(seed)).run()
