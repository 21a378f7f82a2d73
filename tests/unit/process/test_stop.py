"""Signals that ask a process to stop, sent to processes that do something else at the time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsv3_megatron.process.stop import STOP_SIGNALS

ROOT = Path(__file__).resolve().parents[3]

COMMAND = """
import sys, time
from dsv3_megatron.process.stop import end_with_a_line
def work():
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("cleared up", flush=True)
    return 0
sys.exit(end_with_a_line(work, "nothing was written"))
"""

# A mutex locked twice waits for ever, and no signal's handler is called meanwhile: as in a collective.
STUCK = """
import ctypes, sys
from dsv3_megatron.process.stop import StopListener
from dsv3_megatron.runs.rank import end_of
mutex, library = ctypes.create_string_buffer(64), ctypes.CDLL(None)
def work():
    library.pthread_mutex_lock(mutex)
    print("ready", flush=True)
    library.pthread_mutex_lock(mutex)
    return 0
with StopListener("nothing was saved"):
    sys.exit(end_of(work))
"""

NOTES = """
import ctypes, sys, time
from dsv3_megatron.process.stop import StopListener, stop_calls
seen = []
with StopListener("nothing was saved"), stop_calls(seen.append):
    print("ready", flush=True)
    while not seen:
        time.sleep(0.01)
print("noted", seen[0], flush=True)
"""


def start(program: str, *, ignored: tuple[int, ...] = (), **variables: str) -> subprocess.Popen[str]:
    def set_signals() -> None:
        for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):  # those of a test run in the background
            signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)

    process = subprocess.Popen([sys.executable, "-c", program], text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, preexec_fn=set_signals,
                               env={**os.environ, "PYTHONPATH": str(ROOT), **variables})
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_command_clears_up_and_ends_with_a_line(number: signal.Signals) -> None:
    process = start(COMMAND)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (128 + number, "cleared up\n")
    assert err == f"stopped by {number.name}: nothing was written\n"


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_what_a_command_was_started_to_ignore_it_ignores(number: signal.Signals) -> None:
    process = start(COMMAND, ignored=(number,))
    process.send_signal(number)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    process.terminate()
    assert process.wait(timeout=20) == 128 + signal.SIGTERM
    process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_rank_that_is_stuck_ends_all_the_same(number: signal.Signals) -> None:
    process = start(STUCK)
    time.sleep(0.5)  # until it is stuck
    started = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number and time.monotonic() - started < 20
    assert err == f"stopped by {number.name}: nothing was saved\n"


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_rank_may_take_note_of_a_signal(number: signal.Signals) -> None:
    process = start(NOTES)
    process.send_signal(number)
    assert process.communicate(timeout=20)[0] == f"noted {int(number)}\n"
    assert process.returncode == 0


def test_a_rank_heeds_the_interrupt_that_a_script_had_it_ignore() -> None:
    process = start(NOTES, ignored=(signal.SIGINT, signal.SIGQUIT))
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[0] == f"noted {int(signal.SIGINT)}\n"


def test_under_torchrun_its_end_is_a_signal_to_stop() -> None:
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {NOTES!r}]); time.sleep(60)"
    process = start(parent, TORCHELASTIC_RUN_ID="none")
    process.kill()
    assert process.stdout is not None and process.stdout.readline() == f"noted {int(signal.SIGTERM)}\n"
    process.communicate(timeout=20)


def test_under_torchrun_a_rank_that_does_not_end_is_ended() -> None:
    stuck = STUCK.replace('("nothing was saved")', '("nothing was saved"), stop_calls(lambda number: None)').replace(
        "import StopListener", "import StopListener, stop_calls")
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {stuck!r}]); time.sleep(60)"
    process = start(parent, TORCHELASTIC_RUN_ID="none", SHUTDOWN_TIMEOUT="1")
    time.sleep(0.5)
    started = time.monotonic()
    process.kill()
    _, err = process.communicate(timeout=30)  # the pipe is closed when the last that has it has ended
    assert "stopped by SIGTERM: torchrun is gone\n" in err and time.monotonic() - started < 20
