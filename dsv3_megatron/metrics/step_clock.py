"""Measures where a step's time goes: a clock for named parts that may lie within one another.

A part's time is its own: what a part within it takes is not counted twice, so that the parts of a step add up to
its time. Times add up until they are taken, so that a step nobody looks at costs two readings of a clock a part.

Usage:
    clock = StepClock()
    with clock.part("forward-backward"):
        for batch in clock.waiting(batches, "data"):      # the wait for each batch is "data"
            ...
    clock.take()                                          # {"data": 0.01, "forward-backward": 0.4}
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator


class StepClock:
    """A clock that sums seconds by part of a step.

    Args:
        parts: Names of the parts; each is in what `take` returns.
        synchronize: Waits until the device has done what it was given, so that work counts where it was started;
            None for a CPU. Called at the start and the end of a part.
        now: The clock, in seconds.
    """

    def __init__(self, parts: tuple[str, ...], synchronize: Callable[[], None] | None = None,
                 now: Callable[[], float] = time.perf_counter) -> None:
        self._synchronize = synchronize
        self._now = now
        self._seconds = dict.fromkeys(parts, 0.0)
        self._running: list[str] = []
        self._since = 0.0

    @contextlib.contextmanager
    def part(self, name: str, *, waits_for_device: bool = True) -> Iterator[None]:
        """Count the time of the block as `name`'s, and not as that of the part around it.

        Args:
            name: Name of the part, one of `parts`.
            waits_for_device: False where the host works while the device goes on.
        """
        self._switch(waits_for_device)
        self._running.append(name)
        try:
            yield
        finally:
            self._switch(waits_for_device)
            self._running.pop()

    def _switch(self, waits_for_device: bool) -> None:
        """Give the time since the last switch to the part that ran."""
        if self._synchronize is not None and waits_for_device:
            self._synchronize()
        now = self._now()
        if self._running:
            self._seconds[self._running[-1]] += now - self._since
        self._since = now

    def waiting[T](self, items: Iterator[T], name: str) -> Iterator[T]:
        """Pass items on; the time until each is there is `name`'s."""
        while True:
            with self.part(name, waits_for_device=False):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item

    def take(self) -> dict[str, float]:
        """Seconds by part since the last call; a part that is still running counts from now on anew."""
        self._switch(waits_for_device=False)
        taken = dict(self._seconds)
        self._seconds = dict.fromkeys(taken, 0.0)
        return taken
