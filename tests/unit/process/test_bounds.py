"""Work within bounds of time and memory, after which the process is as it was."""

from __future__ import annotations

import contextlib
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dsv3_megatron.process.bounds import bounded, time_limit

ROOT = Path(__file__).resolve().parents[3]


def limits() -> tuple[object, ...]:
    return (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM),
            signal.getitimer(signal.ITIMER_VIRTUAL))


def test_time_is_bounded() -> None:
    before, started = limits(), time.process_time()
    with pytest.raises(TimeoutError, match=r"it computes for more than 0\.1 s"), bounded(0.1, 10**9):
        while True:
            pass
    assert 0.05 < time.process_time() - started < 2 and limits() == before
    with bounded(0.1, 10**9):
        pass
    while time.process_time() - started < 0.5:  # nothing comes late
        pass
    assert limits() == before


def test_time_that_is_slept_away_does_not_count() -> None:
    with bounded(0.05, 10**9):
        time.sleep(0.2)


class _Over(BaseException):
    """No Exception."""


def test_a_limit_of_the_clock_ends_what_sleeps_and_catches_all() -> None:
    started, before = time.monotonic(), signal.getsignal(signal.SIGALRM)
    with pytest.raises(_Over), time_limit(0.1, is_of_clock=True, error=_Over()):
        while True:
            with contextlib.suppress(Exception):
                time.sleep(10)
    assert time.monotonic() - started < 5
    assert (signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)) == (before, (0.0, 0.0))


# In a process of its own: one that has run other tests may hold that much free memory and need no more.
TAKE_MEMORY = """
import resource
from dsv3_megatron.process.bounds import bounded

before = resource.getrlimit(resource.RLIMIT_AS)
try:
    with bounded(10.0, 50_000_000):
        bytearray(200_000_000)
except MemoryError:
    print("refused")
assert resource.getrlimit(resource.RLIMIT_AS) == before
print(len(bytearray(200_000_000)))
"""


def test_memory_is_bounded_and_can_be_had_afterwards() -> None:
    done = subprocess.run([sys.executable, "-c", TAKE_MEMORY], cwd=ROOT, capture_output=True, text=True, check=True,
                          timeout=60)
    assert done.stdout.split() == ["refused", "200000000"]


def test_a_thread_has_no_bound_of_time_and_fails_for_none() -> None:
    done = []

    def work() -> None:
        with bounded(0.01, 10**9):
            done.append(sum(range(3_000_000)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done
