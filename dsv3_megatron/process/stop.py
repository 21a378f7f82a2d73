"""Signals that ask a process to stop: a command ends with a line instead of a traceback, a rank of a run decides.

Python runs a signal's handler in the main thread, between two of its instructions. A rank may be inside a collective
for minutes, so it also has a thread that is woken by the signal itself (`signal.set_wakeup_fd`). The thread looks after
the parent as well: a rank under torchrun must not go on without it.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.streams import reader_gone_calls
from dsv3_megatron.process.elastic import elastic_launch

__all__ = ["STOP_SIGNALS", "StopListener", "Stopped", "default_stops", "end_with_a_line",
           "reset_in_child", "shutdown_timeout_s", "signal_name", "stop_calls"]

# Slurm sends what --signal names; a batch system USR1, USR2 or XCPU; a terminal INT, QUIT and HUP; a UPS PWR.
STOP_SIGNALS = tuple(getattr(signal, name) for name in (
    "SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGALRM", "SIGPWR")
    if hasattr(signal, name))
# nohup has a process ignore HUP: it stays so. A shell has a background job ignore INT and QUIT, for the sake of the
# terminal's keys: a command leaves it so, a rank does not, for nobody types to it.
_LEFT_TO_COMMANDS = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT)
_POLL_S = 0.5
# The main thread has so long to unwind before the process ends without.
_UNWIND_S = 2.0
# Ctrl-C again after this long ends a run of one process at once.
_AGAIN_S = 0.5
_SHUTDOWN_S = 30
_FAILED = 128

Handler = Callable[[int], None]


class Stopped(KeyboardInterrupt):
    """A signal asked this process to stop; `number` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal_name(number)}")
        self.number = number

    @property
    def exit_code(self) -> int:
        """What a shell reports of a process that the signal ended."""
        return _FAILED + self.number


def signal_name(number: int) -> str:
    """SIGTERM for 15; the number's digits if it has no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def end_with_a_line(work: Callable[[], int], left: str) -> int:
    """Run a command of one process; a signal that asks it to stop raises `Stopped` inside and ends with one line.

    Args:
        work: The command; returns its exit code.
        left: What a stop leaves behind, for the line.

    Returns:
        The command's exit code; 128 and the signal's number after a stop, also where the command returned after it.
    """
    seen: list[int] = []
    owner, last_s = os.getpid(), -_AGAIN_S

    def on_signal(number: int, _frame: object) -> None:
        nonlocal last_s
        seen.append(number)
        # Of several at once (a closing terminal's) one is enough: another would cut short the clearing up.
        if os.getpid() == owner and time.monotonic() - last_s >= _AGAIN_S:
            last_s = time.monotonic()
            raise Stopped(number)

    with _handlers(on_signal, left_alone=_LEFT_TO_COMMANDS):
        try:
            status = work()
            return _FAILED + seen[-1] if seen and status else status
        except Stopped as stop:
            sys.stdout.flush()
            print(f"stopped by {signal_name(stop.number)}: {left}", file=sys.stderr, flush=True)
            return stop.exit_code


@contextlib.contextmanager
def _handlers(on_signal: Callable[[int, object], None], *, left_alone: tuple[int, ...]) -> Iterator[None]:
    """Install one handler for all stop signals; of `left_alone`, those that are ignored stay so."""
    if threading.current_thread() is not threading.main_thread():
        yield  # a library call from a thread: signals are the caller's
        return
    previous = {}
    for number in STOP_SIGNALS:
        before = signal.getsignal(number)
        if before is None or (before is signal.SIG_IGN and number in left_alone):
            continue
        previous[number] = before
        signal.signal(number, on_signal)
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


@contextlib.contextmanager
def default_stops() -> Iterator[None]:
    """Let signals end this process as if nobody handled them, for a library that looks at no signal for minutes."""
    previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    handled = [number for number, before in previous.items() if callable(before)]
    for number in handled:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, previous[number])


def reset_in_child() -> None:
    """Give a forked child the signals of a process of its own, but for the terminal's, which its parent decides on."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN if number in _LEFT_TO_COMMANDS else signal.SIG_DFL)
    signal.set_wakeup_fd(-1)


class StopListener:
    """A context manager in which a rank's stop signals call a function, whatever its main thread is doing.

    Until `stop_calls` says otherwise a signal raises `Stopped` in the main thread, and ends the process after a moment
    if that is inside a function that does not return. Under torchrun its end counts as SIGTERM; then the process ends
    after SHUTDOWN_TIMEOUT seconds (30) at the latest.

    Args:
        where: What is said of a process that has to be ended.
    """

    active: StopListener | None = None

    def __init__(self, where: str) -> None:
        self.where = where
        self.is_under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        self._calls: list[Handler | None] = [None]
        self._owner, self._parent = os.getpid(), os.getppid()
        self._first_s: float | None = None
        self._has_raised = False
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> StopListener:
        if StopListener.active is not None or threading.current_thread() is not threading.main_thread():
            return StopListener.active or self
        StopListener.active = self
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._ended = threading.Event()
        previous = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._stack.callback(signal.set_wakeup_fd, previous)
        self._stack.enter_context(_handlers(self._on_signal, left_alone=(signal.SIGHUP,)))
        self._thread = threading.Thread(target=self._listen, name="stop signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if StopListener.active is not self:
            return
        self._ended.set()
        self._stack.close()
        os.write(self._writer, b"\0")
        self._thread.join()
        os.close(self._reader)
        os.close(self._writer)
        StopListener.active = None

    def _on_signal(self, number: int, _frame: object) -> None:
        """Note the signal in the main thread; a forked child (a checkpoint's writer) leaves it to its parent."""
        if os.getpid() != self._owner:
            return
        call = self._calls[-1]
        if call is not None:
            call(number)
        elif not self._has_raised:
            self._has_raised = True
            raise Stopped(number)

    def _listen(self) -> None:
        deadline = float("inf")
        while not self._ended.is_set():
            ready, _, _ = select.select([self._reader], [], [], _POLL_S)
            for number in os.read(self._reader, 64) if ready else b"":
                if number in STOP_SIGNALS:
                    self._stop(number)
            if self.is_under_torchrun and deadline == float("inf") and os.getppid() != self._parent:
                if elastic_launch():  # a node that is gone: the others go on without it, and do not wait for it
                    self._end(signal.SIGTERM, "torchrun is gone")
                deadline = time.monotonic() + shutdown_timeout_s()
                os.kill(self._owner, signal.SIGTERM)
            if time.monotonic() > deadline:
                self._end(signal.SIGTERM, "torchrun is gone")

    def _stop(self, number: int) -> None:
        """Tell, in the thread, the function in force, or see to it that the process ends."""
        now = time.monotonic()
        first_s, self._first_s = self._first_s, self._first_s or now
        call = self._calls[-1]
        if call is None:
            if not self._ended.wait(_UNWIND_S):
                self._end(number, self.where)
        elif number == signal.SIGINT and first_s and now - first_s > _AGAIN_S and not self.is_under_torchrun:
            self._end(number, "asked twice")
        else:
            call(number)

    def _end(self, number: int, why: str) -> None:
        if self._ended.is_set():
            return
        print(f"stopped by {signal_name(number)}: {why}", file=sys.stderr, flush=True)
        os._exit(_FAILED + number)


@contextlib.contextmanager
def stop_calls(function: Handler | None, where: str = "") -> Iterator[None]:
    """Have stop signals call `function` with their number, from any thread and maybe twice; None: they end the process.

    That nobody reads an output any more (`| head`, a `tee` that has died) counts as SIGPIPE. Without a listener around
    it there is one for this time.
    """
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(StopListener(where))
        listener._calls.append(function)
        stack.callback(listener._calls.pop)
        if function is not None:
            stack.enter_context(reader_gone_calls(lambda: function(signal.SIGPIPE)))
        yield


def shutdown_timeout_s() -> int:
    """Seconds that a rank has to end, from SHUTDOWN_TIMEOUT as torchrun has them from the launcher.

    Raises:
        ConfigError: SHUTDOWN_TIMEOUT is not a whole number from 1 to 86400.
    """
    value = os.environ.get("SHUTDOWN_TIMEOUT", str(_SHUTDOWN_S))
    if not value.isascii() or not value.isdigit() or not 1 <= int(value) <= 86400:
        raise ConfigError(f"SHUTDOWN_TIMEOUT={value!r} must be a whole number from 1 to 86400 (seconds); set it so, or "
                          "unset it")
    return int(value)
