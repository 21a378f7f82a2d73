"""Gives a tracker what a run logs, from a thread: the run neither waits for it nor ends with it.

A server may be slow, gone or full, and a library may raise anything. What is logged waits in a queue of bounded size;
what does not reach the tracker is counted. It is said once when something fails, once when it works again, and at the
end how much is missing. TensorBoard's files and metrics.jsonl, which are written without a thread, have it all the
same. No torch.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial

from dsv3_megatron.metrics.trackers.tracked_values import TrackedValues, Tracker

# What waits for a tracker is at most of this size; beyond it the oldest is lost.
LIMIT_BYTES = 64_000_000
# Seconds between attempts to begin, and those that the end of a run waits for what is left.
RETRY_S, CLOSE_S = 60.0, 60.0

logger = logging.getLogger(__name__)


class TrackerThread:
    """A tracker and the thread that calls it. No method raises, and none but `close` waits.

    Args:
        tracker: Gets what is logged; called in the thread alone.
        limit_bytes: Size of what may wait for it.
        retry_s: Seconds from an attempt to begin that failed to the next one.
        close_s: Seconds that `close` waits at the most.

    Attributes:
        name: Name of the tracker.
        num_written: Moments that reached the tracker.
        num_lost: Moments that did not.
    """

    def __init__(self, tracker: Tracker, *, limit_bytes: int = LIMIT_BYTES, retry_s: float = RETRY_S,
                 close_s: float = CLOSE_S) -> None:
        self.name = tracker.name
        self.num_written = self.num_lost = 0
        self._tracker = tracker
        self._limit_bytes, self._retry_s, self._close_s = limit_bytes, retry_s, close_s
        self._kept: deque[TrackedValues] = deque()
        self._kept_bytes = 0
        self._changed = threading.Condition()
        self._is_closing = self._is_open = self._has_failed = self._is_closed = False
        self._next_try = 0.0
        self._thread = threading.Thread(target=self._work, name=f"tracker {self.name}", daemon=True)
        self._thread.start()

    def put(self, values: TrackedValues) -> None:
        """Hand over a moment's values, which must not change any more."""
        with self._changed:
            self._kept.append(values)
            self._kept_bytes += values.num_bytes
            while self._kept_bytes > self._limit_bytes and len(self._kept) > 1:
                self._kept_bytes -= self._kept.popleft().num_bytes
                self.num_lost += 1
            self._changed.notify()

    def close(self) -> None:
        """Wait for what is left, for a while, and say what is missing; may be called twice."""
        if self._is_closed:
            return
        self._is_closed = True
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join(self._close_s)
        with self._changed:
            self.num_lost += len(self._kept)
            self._kept.clear()
        if self._thread.is_alive():
            logger.warning("%s has not taken the last values in %.0f s; the run ends without it", self.name,
                           self._close_s)
        if self.num_lost:
            logger.warning("%s lacks %d of %d logged moments; the logs folder has them all", self.name, self.num_lost,
                           self.num_lost + self.num_written)

    # ---- the thread ----------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closing or self._is_due(), timeout=self._pause())
                is_last = self._is_closing
                if not self._kept and is_last:
                    break
                if not self._is_due() and not is_last:
                    continue
            if not self._is_open:
                self._is_open = self._try(self._tracker.open, "cannot begin")
                self._next_try = time.monotonic() + self._retry_s
                if not self._is_open and is_last:
                    return  # close counts what is left
                continue
            with self._changed:
                values = self._kept.popleft()
                self._kept_bytes -= values.num_bytes
            if self._try(partial(self._tracker.write, values), "cannot be written"):
                self.num_written += 1
                self._note_success()
            else:
                self.num_lost += 1
        if self._is_open:
            self._try(self._tracker.close, "cannot end the run")

    def _is_due(self) -> bool:
        return bool(self._kept) and (self._is_open or time.monotonic() >= self._next_try)

    def _pause(self) -> float | None:
        return max(0.0, self._next_try - time.monotonic()) if self._kept else None

    def _try(self, call: Callable[[], None], what: str) -> bool:
        try:
            call()
        except (Exception, SystemExit) as error:  # noqa: BLE001 - said and counted: no tracker ends a run
            if not self._has_failed:
                logger.warning("%s %s: %s: %s; the run goes on, and what is missing there is counted", self.name, what,
                               type(error).__name__, error)
            self._has_failed = True
            return False
        return True

    def _note_success(self) -> None:
        if self._has_failed:
            logger.warning("%s can be written again; %d logged moments are missing there so far", self.name,
                           self.num_lost)
        self._has_failed = False
