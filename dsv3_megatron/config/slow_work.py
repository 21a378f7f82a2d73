"""A bar for work that may take longer than three seconds: on a terminal, and not before these have passed.

Usage:
    with slow_work("verify", total=num_bytes, unit="B") as work:
        work.add(4096)                      # from any thread
    with slow_work("search layouts"):       # nothing to count: the seconds go on
        ...
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

_DELAY_S = 3.0
_TICK_S = 0.5
_UNCOUNTED = "{desc}: {elapsed}"


class SlowWork:
    """What `slow_work` gives: counts what is done. Without a terminal every method does nothing but `say`."""

    def __init__(self, bar: Any) -> None:
        self._bar, self._lock = bar, threading.Lock()

    def add(self, count: int = 1) -> None:
        """Count so many units more."""
        if self._bar is not None:
            with self._lock:
                self._bar.update(count)

    def reach(self, count: int) -> None:
        """Have so many units in all."""
        if self._bar is not None:
            with self._lock:
                self._bar.update(count - self._bar.n)

    def say(self, line: str) -> None:
        """Print a line on stderr that does not break the bar."""
        if self._bar is None:
            print(line, file=sys.stderr, flush=True)
        else:
            with self._lock:
                self._bar.write(line, file=sys.stderr)


@contextlib.contextmanager
def slow_work(what: str, *, total: int | None = None, unit: str = "", shown: bool = True, ticks: bool = True
              ) -> Iterator[SlowWork]:
    """Show a bar on stderr while the block runs, if that is a terminal and the block takes so long; it goes at the end.

    Args:
        what: Name of the work, for the line.
        total: Units of all of the work; None: it is not counted, and the seconds are shown.
        unit: Name of a unit; "B" for bytes, which get their magnitude.
        shown: False shows nothing: of several processes that do the same, one shows it.
        ticks: False starts no thread, for a process that forks: the bar moves where something is counted.
    """
    if not shown or sys.stderr is None or not sys.stderr.isatty():
        yield SlowWork(None)
        return
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    if not ticks:
        tqdm.monitor_interval = 0  # tqdm's own thread
    bar = tqdm(total=total, unit=unit, unit_scale=unit == "B", desc=what, delay=_DELAY_S, leave=False, file=sys.stderr,
               dynamic_ncols=True, bar_format=None if total else _UNCOUNTED)
    work, ended = SlowWork(bar), threading.Event()

    def tick() -> None:
        while not ended.wait(_TICK_S):  # the seconds go on, also where nothing is counted for long
            with work._lock:
                bar.update(0)
                if bar.format_dict["elapsed"] >= _DELAY_S:
                    bar.refresh()

    thread = threading.Thread(target=tick, name="slow work", daemon=True)
    if ticks:
        thread.start()
    try:
        with logging_redirect_tqdm():
            yield work
    finally:
        ended.set()
        if ticks:
            thread.join()
        bar.close()
