"""A run neither waits for a tracker nor ends with it; what is missing there is counted and said."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from dsv3_megatron.metrics.trackers.tracked_values import TrackedValues
from dsv3_megatron.metrics.trackers.tracker_thread import TrackerThread


class Scripted:
    """A tracker whose calls do what a test says."""

    name = "scripted"

    def __init__(self, *, open_: Callable[[], None] = lambda: None,
                 write: Callable[[int], None] = lambda step: None, close: Callable[[], None] = lambda: None) -> None:
        self._open, self._write, self._close = open_, write, close
        self.steps: list[int] = []
        self.num_opened = self.num_closed = 0

    def open(self) -> None:
        self.num_opened += 1
        self._open()

    def write(self, values: TrackedValues) -> None:
        self._write(values.step)
        self.steps.append(values.step)

    def close(self) -> None:
        self.num_closed += 1
        self._close()


def fail(error: BaseException) -> None:
    raise error


def put_steps(thread: TrackerThread, *steps: int) -> None:
    for step in steps:
        thread.put(TrackedValues(step, {"lm loss": 1.0}))


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_everything_arrives_in_order_and_is_ended_once(caplog: pytest.LogCaptureFixture) -> None:
    tracker = Scripted()
    thread = TrackerThread(tracker)
    put_steps(thread, *range(50))
    thread.close()
    thread.close()
    assert tracker.steps == list(range(50)) and (tracker.num_opened, tracker.num_closed) == (1, 1)
    assert (thread.num_written, thread.num_lost, messages(caplog)) == (50, 0, [])


def test_a_tracker_without_anything_to_write_is_never_begun() -> None:
    tracker = Scripted()
    TrackerThread(tracker).close()
    assert tracker.num_opened == tracker.num_closed == 0


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("anything"), SystemExit(1)])
def test_what_a_write_raises_is_said_once_and_counted_and_so_is_that_it_works_again(
        error: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    tracker = Scripted(write=lambda step: fail(error) if step < 3 else None)
    thread = TrackerThread(tracker)
    put_steps(thread, 0, 1, 2, 3, 4)
    thread.close()
    assert tracker.steps == [3, 4] and (thread.num_written, thread.num_lost) == (2, 3)
    first, again, end = messages(caplog)
    assert first == (f"scripted cannot be written: {type(error).__name__}: {error}; the run goes on, and what is "
                     "missing there is counted")
    assert again == "scripted can be written again; 3 logged moments are missing there so far"
    assert end == "scripted lacks 3 of 5 logged moments; the logs folder has them all"


def test_a_server_that_comes_later_gets_what_was_kept(caplog: pytest.LogCaptureFixture) -> None:
    tries = iter([ConnectionError("refused"), ConnectionError("refused"), None])

    def begin() -> None:
        error = next(tries)
        if error is not None:
            raise error

    tracker = Scripted(open_=begin)
    thread = TrackerThread(tracker, retry_s=0.01)
    put_steps(thread, 1, 2, 3)
    for _ in range(500):
        if thread.num_written == 3:
            break
        time.sleep(0.01)
    thread.close()
    assert tracker.steps == [1, 2, 3] and tracker.num_opened == 3 and thread.num_lost == 0
    assert [text.partition(":")[0] for text in messages(caplog)] == [
        "scripted cannot begin", "scripted can be written again; 0 logged moments are missing there so far"]


def test_a_server_that_never_comes_is_asked_again_at_the_end_and_no_longer(caplog: pytest.LogCaptureFixture) -> None:
    tracker = Scripted(open_=lambda: fail(ConnectionError("refused")))
    thread = TrackerThread(tracker, retry_s=1000.0)
    put_steps(thread, 1, 2, 3)
    started = time.monotonic()
    thread.close()
    assert time.monotonic() - started < 30 and thread.num_lost == 3 and tracker.num_closed == 0
    assert tracker.num_opened <= 2 and messages(caplog)[-1].startswith("scripted lacks 3 of 3 logged moments")


def test_a_tracker_that_hangs_holds_neither_the_steps_nor_the_end(caplog: pytest.LogCaptureFixture) -> None:
    goes_on = threading.Event()
    tracker = Scripted(write=lambda step: fail(RuntimeError("late")) if goes_on.wait(60) else None)
    thread = TrackerThread(tracker, limit_bytes=1000, close_s=0.2)
    started = time.monotonic()
    put_steps(thread, *range(100))
    assert time.monotonic() - started < 5
    thread.close()
    goes_on.set()
    # One is in the tracker's hands, or all are still kept; nothing beyond the limit was.
    assert thread.num_lost >= 99
    assert "scripted has not taken the last values in 0 s; the run ends without it" in messages(caplog)


def test_an_end_that_fails_is_said(caplog: pytest.LogCaptureFixture) -> None:
    thread = TrackerThread(Scripted(close=lambda: fail(OSError("gone"))))
    put_steps(thread, 1)
    thread.close()
    assert messages(caplog) == ["scripted cannot end the run: OSError: gone; the run goes on, and what is missing "
                                "there is counted"]
