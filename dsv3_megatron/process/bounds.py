"""Work that a stranger's text describes, within bounds of time and memory: a chat template is a program."""

from __future__ import annotations

import contextlib
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType


@contextlib.contextmanager
def time_limit(seconds: float, *, is_of_clock: bool, error: BaseException) -> Iterator[None]:
    """Do some work that may take so much time.

    Only the main thread can be interrupted, between two instructions of Python: in another thread, time has no limit.

    Args:
        seconds: Seconds that the work may take.
        is_of_clock: Count seconds of the clock; else those that this process computes, so that a busy machine does no
            harm.
        error: What is raised where the time is over; one that is no Exception gets through work that catches those.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    timer, number = ((signal.ITIMER_REAL, signal.SIGALRM) if is_of_clock
                     else (signal.ITIMER_VIRTUAL, signal.SIGVTALRM))

    def end(_number: int, _frame: FrameType | None) -> None:
        raise error

    before = signal.signal(number, end)
    try:
        signal.setitimer(timer, seconds)
        yield
    finally:
        signal.setitimer(timer, 0.0)
        signal.signal(number, before)


@contextlib.contextmanager
def bounded(cpu_s: float, num_bytes: int) -> Iterator[None]:
    """Do some work that may take so much time and memory; in this process, which goes on afterwards.

    Only the main thread can be interrupted, between two instructions of Python: in another thread, time has no bound.

    Args:
        cpu_s: Seconds that this process may compute. They are no seconds of the clock: a busy machine does no harm.
        num_bytes: Memory that the process may take beyond what it has.

    Raises:
        TimeoutError: the time is over.
        MemoryError: by whatever asks for more memory.
    """
    limits = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_bytes().split()[0]) * resource.getpagesize()
    soft = taken + num_bytes
    is_limiting = not 0 <= limits[0] <= soft
    if is_limiting:
        resource.setrlimit(resource.RLIMIT_AS, (soft, limits[1]))
    try:
        with time_limit(cpu_s, is_of_clock=False, error=TimeoutError(f"it computes for more than {cpu_s:g} s")):
            yield
    finally:
        if is_limiting:
            resource.setrlimit(resource.RLIMIT_AS, limits)
