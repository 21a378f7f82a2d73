"""A watchdog in each rank: a rank that no longer moves ends the run, with everybody's stacks, instead of silence.

The training thread leaves signs of life (`Watchdog.beat`) between the parts of a step. A thread beside it looks at the
last one. If that is too old, this rank or one that it waits for has stopped: the thread raises an alarm in the store
that torch.distributed started with, where the watchdogs of all ranks find it. Each then writes the stacks of all its
threads and tells the others where it was; the first to do so waits for the rest and writes which rank was where. Then
all end with EXIT_HANG.

Parts that may take long without a sign (the first step, checkpoints, validation, export) are marked slow and have
SLOW_FACTOR times as long. A thread of Python stops with the others while a C function keeps the interpreter's lock:
for that case faulthandler's timer, which needs no lock, is set ahead again and again; if nobody does, it writes the
stacks to stderr and ends the process.
"""

from __future__ import annotations

import datetime
import faulthandler
import json
import logging
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsv3_megatron.config.guards import SLOW_FACTOR
from dsv3_megatron.config.output import json_text
from dsv3_megatron.guards.endings import tell_launcher

__all__ = ["EXIT_HANG", "Watchdog", "summary"]

EXIT_HANG = 4
# Folder in which each rank touches a file while it gives signs of life, and which has none where no rank is at work.
ALIVE = "DSV3_ALIVE"
# Looks at the last sign of life this often, and at least that often in each timeout.
_POLL_S, _POLLS_IN_TIMEOUT = 5.0, 10
# Ranks wait for each other's answers for this many polls, and at least that long; then as many again as the last word
# of one that cannot answer may take.
_ANSWER_POLLS, _ANSWER_S, _LAST_WORD_POLLS = 4, 3.0, 3
_NUM_LISTED = 32
_STDERR = 2
# Between looks at whether others have answered.
_SHORT_S = 0.1
_STORE_PREFIX = "dsv3_megatron_watchdog"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Beat:
    """A sign of life: what the training thread began, and when.

    Attributes:
        step: Number of the step, counted from 1; 0 before the first.
        part: Part of the step, in words.
        number: How often this part began in this step.
        is_slow: The part may take SLOW_FACTOR times as long.
        time_s: Time of the sign, as time.monotonic() has it.
    """

    step: int
    part: str
    number: int
    is_slow: bool
    time_s: float


class Watchdog:
    """Signs of life of one rank, and the thread that looks at them.

    Args:
        timeout_s: Seconds without a sign inside a step that are a hang; 0: the watchdog does nothing.
        folder: Folder for a file of stacks per rank; None: they go to stderr.
    """

    def __init__(self, timeout_s: float, *, folder: str | None) -> None:
        self._timeout_s = timeout_s
        self._folder = Path(folder) if folder else None
        self._rank, self._world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self._poll_s = min(_POLL_S, timeout_s / _POLLS_IN_TIMEOUT)
        self._answer_s = max(_ANSWER_S, _ANSWER_POLLS * self._poll_s)
        self._beat = Beat(0, "starting", 1, True, time.monotonic())
        alive = os.environ.get(ALIVE)
        self._alive = Path(alive) / f"rank-{os.environ.get('LOCAL_RANK', '0')}" if alive else None
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._store: Any = None

    def start(self) -> None:
        """Start to watch. The training thread has its first sign now."""
        if not self._timeout_s:
            return
        if self._world_size > 1:
            self._store = _own_store(timeout_s=self._answer_s)
        self._beat = Beat(0, "starting", 1, True, time.monotonic())
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Watch no longer; may be called twice."""
        if self._thread is not None:
            self._stopped.set()
            self._thread.join()
            self._thread = None
            if self._alive is not None:
                self._alive.unlink(missing_ok=True)
            faulthandler.cancel_dump_traceback_later()

    def begin_step(self, step: int) -> None:
        """A sign of life: step `step`, counted from 1, begins. The first one may be slow: it compiles and allocates."""
        last = self._beat
        self._put(Beat(step, "begin of the step", 1, last.step == 0, time.monotonic()))

    def beat(self, part: str) -> None:
        """A sign of life: a part of the step under way begins."""
        last = self._beat
        number = last.number + 1 if last.part == part else 1
        self._put(Beat(last.step, part, number, last.is_slow, time.monotonic()))

    def slow(self, part: str) -> None:
        """A sign of life: something begins that may take long, until the next step begins."""
        self._put(Beat(self._beat.step, part, 1, True, time.monotonic()))

    def _put(self, beat: Beat) -> None:
        is_other_limit = beat.is_slow != self._beat.is_slow
        self._beat = beat
        if is_other_limit and self._thread is not None:
            self._arm()  # now: what begins may keep the interpreter's lock from the start

    @property
    def patience_s(self) -> float:
        """Seconds from an alarm to the end of this process, if all goes well: for the report of all ranks."""
        return self._answer_s + _LAST_WORD_POLLS * self._poll_s

    def _limit_s(self) -> float:
        return self._timeout_s * (SLOW_FACTOR if self._beat.is_slow else 1.0)

    def _arm(self) -> None:
        """Set faulthandler's timer ahead; it fires only if nobody does that for longer than the limit.

        After the others' summary, which ends the process's peers, and before they are gone.
        """
        faulthandler.dump_traceback_later(self._limit_s() + self.patience_s, exit=True, file=_STDERR)

    # -- the thread ------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._stopped.wait(self._poll_s):
            self._arm()
            alarm = self._find_alarm()
            if alarm is None and self._silence_s() > self._limit_s():
                alarm = f"rank {self._rank} had no sign of life for more than {self._limit_s():g} s"
                self._tell("alarm", alarm)
            if alarm is not None:
                self._end(alarm)
            self._show_life()

    def _show_life(self) -> None:
        """Touch a file for who looks at this process from outside, such as Kubernetes' liveness probe."""
        if self._alive is not None:
            try:
                self._alive.touch()
            except OSError as error:
                logger.warning("no sign of life can be left, nor is tried again: %s: %s", self._alive, error.strerror)
                self._alive = None

    def _silence_s(self) -> float:
        return time.monotonic() - self._beat.time_s

    def _state(self) -> dict[str, Any]:
        beat = self._beat
        return {"step": beat.step, "part": beat.part, "number": beat.number, "silence_s": round(self._silence_s(), 1)}

    def _find_alarm(self) -> str | None:
        """Another rank's alarm, if there is one; leaves this rank's state for the case that it cannot answer later."""
        self._tell(f"last/{self._rank}", json_text(self._state()))
        return self._ask("alarm")

    def _tell(self, key: str, value: str) -> None:
        if self._store is not None:
            try:
                self._store.set(key, value)
            except RuntimeError as error:  # the process that holds it is gone: torchrun ends this one soon
                logger.debug("watchdog: %s not told: %s", key, error)

    def _ask(self, key: str) -> str | None:
        if self._store is None:
            return None
        try:
            return self._store.get(key).decode() if self._store.check([key]) else None
        except RuntimeError as error:
            logger.debug("watchdog: %s not asked: %s", key, error)
            return None

    def _end(self, alarm: str) -> None:
        """Report, and end the process, whatever goes wrong with the report."""
        try:
            self._report(alarm)
        except Exception:  # noqa: BLE001 - whatever it is, it is printed, and the process ends
            _print(f"rank {self._rank}: {traceback.format_exc()}")
        finally:
            os._exit(tell_launcher(EXIT_HANG))

    def _report(self, alarm: str) -> None:
        """Write this rank's stacks; the first rank to answer waits for the others and writes who was where."""
        state = self._state()
        header = f"rank {self._rank}: {describe(state)}"
        stacks = all_stacks()
        written = self._write(f"hang-rank-{self._rank:05d}.txt", f"hang: {alarm}\n{header}\n{stacks}")
        _print(f"{header}; stacks in {written}" if written else f"{header}; stacks:\n{stacks}")
        self._tell(f"answer/{self._rank}", json_text(state))
        deadline = time.monotonic() + self._answer_s
        if self._count_answer(1) > 1:
            deadline += self._answer_s
            while self._ask("summarized") is None and time.monotonic() < deadline:
                time.sleep(_SHORT_S)
            return
        while self._count_answer(0) < self._world_size and time.monotonic() < deadline:
            time.sleep(_SHORT_S)
        states = {self._rank: state} | self._collect("answer")
        silent = {rank: last for rank, last in self._collect("last").items() if rank not in states}
        text = summary(alarm, states, silent, self._world_size)
        _print(text)
        self._write("hang-summary.txt", text + "\n")
        self._tell("summarized", "1")
        if len(states) < self._world_size:
            time.sleep(_LAST_WORD_POLLS * self._poll_s)

    def _count_answer(self, number: int) -> int:
        """Ranks that have answered, after `number` more."""
        try:
            return self._store.add("answers", number) if self._store is not None else 1
        except RuntimeError as error:
            logger.debug("watchdog: answers not counted: %s", error)
            return 1

    def _collect(self, kind: str) -> dict[int, dict[str, Any]]:
        """What ranks have told under a kind of key."""
        texts = {rank: self._ask(f"{kind}/{rank}") for rank in range(self._world_size)}
        return {rank: json.loads(text) for rank, text in texts.items() if text is not None}

    def _write(self, name: str, text: str) -> Path | None:
        """A file in the folder, if there is one; that it cannot be written must not keep the run from ending."""
        if self._folder is None:
            return None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / name).write_text(text, encoding="utf-8")
        except OSError as error:
            _print(f"rank {self._rank}: {name} cannot be written to {self._folder}: {error.strerror}")
            return None
        return self._folder / name


def _own_store(timeout_s: float) -> Any:
    """A connection of the watchdog's own to the store of this run: the other one may be what a rank hangs in."""
    from torch.distributed import PrefixStore
    from torch.distributed.distributed_c10d import _get_default_store

    store = _get_default_store().clone()
    store.set_timeout(datetime.timedelta(seconds=timeout_s))
    return PrefixStore(f"{_STORE_PREFIX}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def all_stacks() -> str:
    """The Python stacks of all threads of this process."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
        faulthandler.dump_traceback(file=file, all_threads=True)
        file.seek(0)
        return file.read()


def describe(state: Mapping[str, Any]) -> str:
    """Say at which step and part a rank was, and for how long it has been silent."""
    number = f" {state['number']}" if state["number"] > 1 else ""
    return f"step {state['step']}, {state['part']}{number}, silent for {state['silence_s']:g} s"


def summary(alarm: str, states: Mapping[int, Mapping[str, Any]], silent: Mapping[int, Mapping[str, Any]],
            world_size: int) -> str:
    """Which rank was where, those that did not answer first, then those furthest behind.

    Args:
        alarm: Description of what raised the alarm.
        states: State of each rank that answered.
        silent: The last known of the ranks that did not.
        world_size: Ranks of the run.
    """
    lines = [f"hang: {alarm}; {len(states)} of {world_size} ranks answered. Furthest behind first:"]
    missing = [rank for rank in range(world_size) if rank not in states]
    entries = []
    for rank in missing:
        last = f"; last seen at {describe(silent[rank])}" if rank in silent else ""
        entries.append(f"  rank {rank}: no answer (ended, stopped, or in a C function that keeps Python's lock){last}")
    behind = sorted(states, key=lambda rank: (states[rank]["step"], -states[rank]["silence_s"]))
    entries += [f"  rank {rank}: {describe(states[rank])}" for rank in behind]
    lines += entries[:_NUM_LISTED]
    if len(entries) > _NUM_LISTED:
        lines.append(f"  and {len(entries) - _NUM_LISTED} more")
    return "\n".join(lines)


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
