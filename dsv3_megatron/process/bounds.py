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
    is_timed = threading.current_thread() is threading.main_thread()

    def end(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"it computes for more than {cpu_s:g} s")

    if is_limiting:
        resource.setrlimit(resource.RLIMIT_AS, (soft, limits[1]))
    before = signal.signal(signal.SIGVTALRM, end) if is_timed else None
    try:
        if is_timed:
            signal.setitimer(signal.ITIMER_VIRTUAL, cpu_s)
        yield
    finally:
        if is_timed:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
            signal.signal(signal.SIGVTALRM, before)
        if is_limiting:
            resource.setrlimit(resource.RLIMIT_AS, limits)
