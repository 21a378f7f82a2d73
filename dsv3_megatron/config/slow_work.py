"""A bar for work that may take longer than three seconds: on a terminal, and not before these have passed.

Usage:
    with slow_work("verify", total=num_bytes, unit="B") as work:
        work.add(4096)                      # from any thread
    with slow_work("search layouts"):       # nothing to count: the seconds go on
        ...
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, TextIO

_DELAY_S = 3.0
_TICK_S = 0.5
_UNCOUNTED = "{desc}: {elapsed}"


class SlowWork:
    """What `slow_work` gives: counts what is done. Without a terminal every method does nothing but `say`."""

    def __init__(self, bar: Any) -> None:
        self._bar, self._lock, self._ticked = bar, threading.Lock(), time.monotonic()

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

    def tick(self) -> None:
        """Let the seconds go on: from a loop that waits, as often as it likes, where there is no thread for it."""
        if self._bar is not None and time.monotonic() - self._ticked >= _TICK_S:
            self._ticked = time.monotonic()
            self._redraw()

    def _redraw(self) -> None:
        with self._lock:
            self._bar.update(0)  # a bar that was only refreshed is not wiped away at the end
            if self._bar.format_dict["elapsed"] >= _DELAY_S:
                self._bar.refresh()

    def say(self, line: str) -> None:
        """Print a line on stderr that does not break the bar."""
        if self._bar is None:
            print(line, file=sys.stderr, flush=True)
        else:
            with self._lock:
                self._bar.write(line, file=sys.stderr)


def bar_width(terminal: TextIO) -> dict[str, Any]:
    """The width of a bar, as tqdm takes it: the terminal's, also after it has changed.

    A terminal that does not say its height, as those of `script`, containers and serial lines may be, would show no
    bar: tqdm takes it for one without rows.
    """
    try:
        size = os.get_terminal_size(terminal.fileno())
    except (AttributeError, OSError, ValueError):
        return {"dynamic_ncols": True}
    return {"dynamic_ncols": True} if size.lines else {"ncols": (size.columns or 80) - 1, "nrows": 24}


@contextlib.contextmanager
def slow_work(what: str, *, total: int | None = None, unit: str = "", shown: bool = True, ticks: bool = True
              ) -> Iterator[SlowWork]:
    """Show a bar on stderr while the block runs, if that is a terminal and the block takes so long; it goes at the end.

    Args:
        what: Name of the work, for the line.
        total: Units of all of the work; None: it is not counted, and the seconds are shown.
        unit: Name of a unit; "B" for bytes, which get their magnitude.
        shown: False shows nothing: of several processes that do the same, one shows it.
        ticks: False starts no thread, for a process that forks: it calls `tick` while it waits.
    """
    if not shown or sys.stderr is None or not sys.stderr.isatty():
        yield SlowWork(None)
        return
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    if not ticks:
        tqdm.monitor_interval = 0  # tqdm's own thread
    bar = tqdm(total=total, unit=unit, unit_scale=unit == "B", desc=what, delay=_DELAY_S, leave=False, file=sys.stderr,
               bar_format=None if total else _UNCOUNTED, **bar_width(sys.stderr))
    work, ended = SlowWork(bar), threading.Event()

    def tick() -> None:
        while not ended.wait(_TICK_S):  # the seconds go on, also where nothing is counted for long
            work._redraw()

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
