"""Runs as processes, some at a time: started, looked after, stopped with whoever started them, and marked when ended.

A run of one process is `python -m dsv3_megatron COMMAND WORDS`; one of several is torchrun's. Its folder has its log
and `state.json`: the words that it was begun with, and the code that it ended with. A run that has ended for good is
not done again. When the process that started it is gone, however it ended, a run is asked to stop: it saves and ends.

Usage:
    queue = RunQueue("train", at_a_time=2, processes=1)
    for event in queue.do(waiting):     # a run that begins, an EndedRun, and None every second
        ...
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import IO, Any

import psutil

from dsv3_megatron.checkpoint.folder import CheckpointError
from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.json_files import read_json_object
from dsv3_megatron.config.launches import EXIT_NEXT_LAYOUT
from dsv3_megatron.config.new_files import replace_text
from dsv3_megatron.config.output import json_text
from dsv3_megatron.config.sweep_file import SweepRun
from dsv3_megatron.guards.claims import LOCK_FILE
from dsv3_megatron.guards.endings import EXIT_CODE_FILE
from dsv3_megatron.guards.lock import RunLock
from dsv3_megatron.process.cores import usable_cores
from dsv3_megatron.process.elastic import EXIT_AGAIN, STOPPED_CODE
from dsv3_megatron.process.parent import environment_of_child, stop_with_parent

STATE, LOG, CODE = "state.json", "log.txt", "exit-code"
PROGRAM = (sys.executable, "-m", "dsv3_megatron")
# Begins each start's part of a log.
LOG_START = "== "
EXIT_DONE, EXIT_GUARD = 0, 3
# Ends for good: a run that a guard has ended would end the same way again.
FINAL = (EXIT_DONE, EXIT_GUARD)
_TICK_S = 0.2
_TOLD_S = 1.0
# Signals that torchrun hands to its processes before it ends.
_TORCHRUN_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"


@dataclass(frozen=True)
class EndedRun:
    """A run that has ended.

    Attributes:
        run: The run.
        code: Exit code, as `dsv3 train` has it; EXIT_AGAIN: it was stopped, and has saved.
        seconds: Duration of this start.
    """

    run: SweepRun
    code: int
    seconds: float


@dataclass
class _Process:
    """A run that is under way."""

    run: SweepRun
    popen: subprocess.Popen[bytes]
    log: IO[bytes]
    began: float
    gpus: tuple[str, ...]


def code_of(run: SweepRun) -> int | None:
    """Exit code that a run of this sweep had when it ended last; None: it has not begun, or was broken off.

    Raises:
        ConfigError: the folder holds a run with other settings, or a state that cannot be read.
    """
    state = run.folder / STATE
    try:
        content = read_json_object(state)
        code, words = content["code"], content["words"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, OSError) as error:
        raise ConfigError(f"{state} cannot be read ({error}); remove {run.folder} to have the run done again"
                          ) from error
    require_same_words(run, words)
    return None if code is None else int(code)


def _note(run: SweepRun, code: int | None) -> None:
    content: dict[str, Any] = {"words": list(run.own_words), "code": code}
    replace_text(run.folder / STATE, json_text(content) + "\n", is_durable=True)


def require_same_words(run: SweepRun, words: Sequence[str]) -> None:
    """Check that what was done in a run's folder, or begun, is what is asked for now.

    Raises:
        ConfigError: other words were given then; the message has the difference.
    """
    if list(words) == list(run.own_words):
        return
    def only(some: Sequence[str], others: Sequence[str]) -> str:
        return " ".join(word for word in some if word not in others) or "less"

    raise ConfigError(f"{run.folder} holds a run with other settings ({only(words, run.own_words)}, now "
                      f"{only(run.own_words, words)}): give the sweep another output, or remove that folder")


class RunQueue:
    """Carries out runs, a number of them at a time.

    Args:
        command: Command that trains: "train", "sft" or "grpo".
        at_a_time: Runs that are under way together.
        processes: Processes of each.
        gpus: Names of the GPUs to share out, a process each; empty: the runs share the cores.

    Raises:
        ConfigError: there are fewer GPUs than processes.
    """

    def __init__(self, command: str, *, at_a_time: int = 1, processes: int = 1, gpus: Sequence[str] = ()) -> None:
        self._command, self._at_a_time, self._processes = command, at_a_time, processes
        if gpus and at_a_time * processes > len(gpus):
            most = len(gpus) // processes
            raise ConfigError(f"at_a_time={at_a_time} x processes={processes} need a GPU each, and there are "
                              f"{len(gpus)}: " + (f"try at_a_time = {most}" if most else "try fewer processes"))
        self._gpus = list(gpus)
        self._under_way: list[_Process] = []

    @property
    def under_way(self) -> tuple[SweepRun, ...]:
        """Runs that have a process now."""
        return tuple(process.run for process in self._under_way)

    def do(self, runs: Sequence[SweepRun]) -> Generator[EndedRun | SweepRun | None]:
        """Do runs. When the iterator is closed, or an error goes through it, those under way are asked to stop.

        Yields:
            A run when it begins, an EndedRun when it has ended, and None about every second.
        """
        waiting, told = list(runs), 0.0
        try:
            while waiting or self._under_way:
                for process in [each for each in self._under_way if each.popen.poll() is not None]:
                    ended = self._collect(process)
                    if ended.code == EXIT_NEXT_LAYOUT:  # goes on at once, under the layout of its next phase
                        waiting.insert(0, ended.run)
                    else:
                        yield ended
                for run in list(waiting):
                    if len(self._under_way) < self._at_a_time and not is_held(run):
                        waiting.remove(run)
                        self._start(run)
                        yield run
                if time.monotonic() - told >= _TOLD_S:
                    told = time.monotonic()
                    yield None
                time.sleep(_TICK_S)
        finally:
            self._stop()

    # -- parts -----------------------------------------------------------------------------------------

    def _start(self, run: SweepRun) -> None:
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / CODE).unlink(missing_ok=True)
        _note(run, None)
        gpus = tuple(self._gpus.pop(0) for _ in range(self._processes)) if self._gpus else ()
        log = (run.folder / LOG).open("ab")
        log.write(f"{LOG_START}{shlex.join(('dsv3', self._command, *run.words))}\n".encode())
        log.flush()
        popen = subprocess.Popen(  # a session of its own: the terminal's Ctrl-C reaches it through us alone
            self._words(run), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            env=self._environment(run, gpus), preexec_fn=stop_with_parent())
        self._under_way.append(_Process(run, popen, log, time.monotonic(), gpus))

    def _words(self, run: SweepRun) -> list[str]:
        python, *program = (*PROGRAM, self._command, *run.words)
        if self._processes == 1:
            return [python, *program]
        return [python, "-m", "dsv3_megatron.platform.local_torchrun", "--nproc-per-node", str(self._processes),
                "--signals-to-handle", _TORCHRUN_SIGNALS, *program]

    def _environment(self, run: SweepRun, gpus: Sequence[str]) -> dict[str, str]:
        variables = environment_of_child() | {STOPPED_CODE: str(EXIT_AGAIN),
                                              EXIT_CODE_FILE: str(run.folder / CODE)}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):  # of whoever started the sweep
            variables.pop(name, None)
        if gpus:
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        threads = 1 if gpus else max(1, usable_cores() // (self._at_a_time * self._processes))
        variables.setdefault("OMP_NUM_THREADS", str(threads))
        return variables

    def _collect(self, process: _Process) -> EndedRun:
        self._under_way.remove(process)
        self._gpus += process.gpus
        process.log.close()
        code, run = process.popen.returncode, process.run
        code = code if code >= 0 else 128 - code
        told = run.folder / CODE
        with contextlib.suppress(FileNotFoundError, ValueError):
            said = int(told.read_text())
            # torchrun ends with 1 whatever its processes end with, and with 0 before another layout.
            code = said if code == 1 or (code, said) == (0, EXIT_NEXT_LAYOUT) else code
        told.unlink(missing_ok=True)
        seconds = time.monotonic() - process.began
        _note(run, code)
        return EndedRun(run, code, seconds)

    def _stop(self) -> None:
        """Ask what is under way to save and end, and wait for it; a second signal to this process kills it."""
        try:
            for process in self._under_way:
                _ask_to_stop(process.popen)
            for process in list(self._under_way):
                process.popen.wait()
                self._collect(process)
        finally:
            for process in self._under_way:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.popen.pid, signal.SIGKILL)
                process.popen.wait()
                process.log.close()


def is_held(run: SweepRun) -> bool:
    """Whether a process of this machine still writes the run's checkpoints, as that of a sweep just killed may."""
    try:
        RunLock(run.checkpoints / LOCK_FILE, "", f"save={run.checkpoints}").refuse_if_held()
    except CheckpointError:
        return True
    return False


def _ask_to_stop(popen: subprocess.Popen[bytes]) -> None:
    """Signal a run; of torchrun its processes, which save and end by themselves, for it would give them half a minute.
    """
    with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
        children = psutil.Process(popen.pid).children() if _is_torchrun(popen) else []
        for process in children or [psutil.Process(popen.pid)]:
            process.send_signal(signal.SIGTERM)


def _is_torchrun(popen: subprocess.Popen[bytes]) -> bool:
    assert isinstance(popen.args, list)
    return "dsv3_megatron.platform.local_torchrun" in popen.args


def visible_gpus() -> list[str]:
    """Names of this machine's GPUs, as CUDA_VISIBLE_DEVICES has them; empty where there are none."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    devices = [line for line in listed.splitlines() if line.startswith("GPU")]  # and below them their MIG parts
    present = [str(number) for number in range(len(devices))]
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None or not present:
        return present
    return [name.strip() for name in chosen.split(",") if name.strip() and not name.strip().startswith("-")]
