"""Processes that are forked from one in which everything has been imported, and supervised until all have ended.

Importing torch and Megatron-Core takes seconds for each process of each launch; a fork takes milliseconds. Whoever
forks must not have run anything in threads: neither a backward pass nor an operation of several threads.

Each rank has a session of its own and says what it says into files of a folder; an error is a file there too.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import json
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dsv3_megatron.config.output import json_text
from dsv3_megatron.process.unpickling import load_own

# Ranks that fail because another did fail a moment later: wait for the first error before ending the rest.
_GRACE_S = 1.0
_TAIL_CHARACTERS = 4000


class RankError(AssertionError):
    """A rank failed; the message holds its traceback and the end of what it printed."""


@dataclass(frozen=True)
class Ending:
    """How several ranks ended.

    Attributes:
        error: "" where all ended well, "failed" or "timeout".
        text: Account of what happened, for people.
        code: Exit code of the lowest rank that failed.
    """

    error: str = ""
    text: str = ""
    code: int = 0


def call_in_ranks(num_ranks: int, function: Callable[[int], Any], *, timeout_s: float, are_alone: bool = False,
                  progress: Callable[[], Any] | None = None) -> list[Any]:
    """Call a function of the rank in so many processes forked from this one, which share a gloo process group.

    Args:
        num_ranks: Number of processes.
        function: Anything that can be called; forked with this process, it need not be picklable.
        timeout_s: Seconds after which the ranks are killed; their stacks are in the error.
        are_alone: Whether each process is a world of its own instead, of one rank.
        progress: Gives something that changes as the ranks get on; timeout_s are counted from its last change.

    Returns:
        What each rank returned, by rank.

    Raises:
        RankError: a rank raised, exited with an error, or was killed.
        TimeoutError: the ranks took longer than timeout_s.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        running: dict[int, int] = {}
        try:
            for rank in range(num_ranks):
                place = (0, 1) if are_alone else (rank, num_ranks)
                environment: dict[str, str | None] = {
                    "RANK": str(place[0]), "LOCAL_RANK": str(place[0]), "WORLD_SIZE": str(place[1]),
                    "LOCAL_WORLD_SIZE": str(place[1])}
                store = folder / (f"store-{rank}" if are_alone else "store")
                running[rank] = fork_rank(rank, folder, environment, partial(
                    leave_result, folder, rank, partial(_in_group, store, *place, partial(function, rank))))
            ending = supervise(dict(running), folder, timeout_s, progress=progress)
        finally:
            end_ranks(running)
        if ending.error == "timeout":
            raise TimeoutError(ending.text)
        if ending.error:
            raise RankError(ending.text)
        return [load_own(folder / f"result-{rank}.pickle") for rank in range(num_ranks)]


def _in_group(store: Path, rank: int, num_ranks: int, function: Callable[[], Any]) -> Any:
    """Start the ranks' process group, call the function, leave the group."""
    import torch

    from dsv3_megatron.parallel.groups import destroy_groups
    from dsv3_megatron.platform import prepare

    torch.set_num_threads(1)
    device = prepare()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group(
        device.backend, store=torch.distributed.FileStore(str(store), num_ranks), rank=rank, world_size=num_ranks,
        timeout=datetime.timedelta(seconds=600))
    result = function()
    torch.distributed.barrier()
    destroy_groups()
    return result


# ---- one rank, seen from the process that forks it ----


def fork_rank(rank: int, folder: Path, environment: Mapping[str, str | None], body: Callable[[], int]) -> int:
    """Start one rank; returns its process id, which is its session's as well.

    Args:
        rank: Number in the names of its files.
        folder: Folder for what it prints, `stdout-RANK` and `stderr-RANK`.
        environment: Variables to set in it; None: to take away.
        body: Function that the rank calls; returns the exit code.
    """
    pid = os.fork()
    if pid:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.setpgid(pid, pid)
        return pid
    try:
        with contextlib.suppress(PermissionError):
            os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(folder / f"{name}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
        for variable, value in environment.items():
            if value is None:
                os.environ.pop(variable, None)
            else:
                os.environ[variable] = value
        os._exit(body())
    finally:
        os._exit(1)


def end_ranks(pids: Mapping[int, int]) -> None:
    """Kill whatever is left of the ranks' sessions: one outlives its rank while a process of it still runs."""
    for pid in pids.values():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


def supervise(running: dict[int, int], folder: Path, timeout_s: float, *, ends_with_parent: bool = False,
              progress: Callable[[], Any] | None = None) -> Ending:
    """Wait until every rank has ended well, one has failed, or time is up.

    Args:
        running: Process ids by rank; emptied as they end.
        folder: Folder of their files.
        timeout_s: Seconds to wait.
        ends_with_parent: Whether to stop where the process that started this one is gone.
        progress: Gives something that changes as the ranks get on; timeout_s are counted from its last change.

    Raises:
        SystemExit: the process that started this one is gone.
    """
    deadline = time.monotonic() + timeout_s
    parent, seen = os.getppid(), progress() if progress else None
    codes: dict[int, int] = {}
    while running:
        for rank, pid in list(running.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                del running[rank]
                codes[rank] = os.waitstatus_to_exitcode(status)
        if ends_with_parent and os.getppid() != parent:
            sys.exit("the process that asked for the ranks is gone")
        if any(codes.values()):
            return Ending("failed", _first_error(running, codes, folder), codes[min(codes)])
        if progress and progress() != seen:
            seen, deadline = progress(), time.monotonic() + timeout_s
        if running and time.monotonic() > deadline:
            for pid in running.values():
                os.kill(pid, signal.SIGUSR1)
            time.sleep(_GRACE_S)
            texts = "\n".join(f"--- rank {rank}:\n{_tail(folder, rank)}" for rank in running)
            return Ending("timeout", f"rank(s) {list(running)} did not end within {timeout_s} s\n{texts}")
        time.sleep(0.01)
    return Ending()


def _first_error(running: dict[int, int], codes: dict[int, int], folder: Path) -> str:
    """The earliest error among the ranks, after those that follow from it had time to appear."""
    if running:
        time.sleep(_GRACE_S)
    num_ranks = len(running) + len(codes)
    for rank, pid in running.items():
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            codes[rank] = os.waitstatus_to_exitcode(status)
    errors = []
    for rank, code in codes.items():
        if code:
            file = folder / f"error-{rank}.json"
            # A rank without a report was ended from outside, which comes before what its peers noticed of it.
            when, text = json.loads(file.read_text()) if file.exists() else (0.0, f"exit code {code}, no traceback")
            errors.append((when, rank, text))
    _when, rank, text = min(errors)
    others = [other for _, other, _ in errors if other != rank]
    note = f" (rank(s) {others} failed after it)" if others else ""
    output = _tail(folder, rank) + output_of(folder, rank, "stdout")
    return f"rank {rank} of {num_ranks} failed{note}:\n{text}\n--- its output:\n{output}"


def output_of(folder: Path, rank: int, stream: str) -> str:
    """What a rank has said, to "stdout" or to "stderr"."""
    file = folder / f"{stream}-{rank}"
    return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""


def _tail(folder: Path, rank: int) -> str:
    """The end of what a rank said."""
    return output_of(folder, rank, "stderr")[-_TAIL_CHARACTERS:]


# ---- one rank, seen from inside ----


def leave_result(folder: Path, rank: int, function: Callable[[], Any]) -> int:
    """Call a function and leave what it returns, or its traceback, for the process that forked this one.

    Returns:
        Exit code: 0, or 1 after an error.
    """
    faulthandler.enable(file=2)
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
    try:
        (folder / f"result-{rank}.pickle").write_bytes(pickle.dumps(function()))
        code = 0
    except BaseException:  # noqa: BLE001 - reported to the parent, which raises it
        partial = folder / f"error-{rank}.partial"
        partial.write_text(json_text((time.time(), traceback.format_exc())))
        partial.rename(folder / f"error-{rank}.json")
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code
