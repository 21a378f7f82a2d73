"""One command in a process of its own that is forked from this one: with little memory, little time, and watched.

Whoever forks has imported everything and run nothing in threads (`certification/rank_forks.py` says why).
"""

from __future__ import annotations

import os
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dsv3_megatron.config.streams import prepare_streams

LIMIT_BYTES = 1_500_000_000
# Of the clock, and of computing: a machine that does much else at the time makes nothing hang.
TIMEOUT_S, MOST_CPU_S = 120.0, 30
_CRASHED = 70
# What no line of ours has: control characters, and what a file says to look like a line of ours.
_FORGED = re.compile(r"[\x00-\x08\x0b-\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029]|^error: forged", re.MULTILINE)
_VARYING = re.compile(r"\d+\.\d+ ?(s|ms|MB/s|GB/s|tokens/s)\b|in \d+\.\d+ s|pid \d+|process \d+")


@dataclass(frozen=True)
class Trial:
    """How a command ended.

    Attributes:
        ending: "done", "refused" (with a message), "traceback", "killed" (by a signal), "hang" (it computes for
            MOST_CPU_S, or takes TIMEOUT_S) or "mute" (an exit code that is not 0, and no message).
        code: Exit code.
        said: What it printed, standard output and then standard error; without times.
        is_quoted: Nothing that it said could be taken for a line, or moves the cursor of a terminal.
        seconds: Time that it took.
        cpu_s: Time that it and its children computed, in seconds.
        peak_mb: Megabytes that it, or the largest of its children, had at its peak beyond what it began with.
    """

    ending: str
    code: int
    said: tuple[str, str]
    is_quoted: bool
    seconds: float
    cpu_s: float = 0.0
    peak_mb: int = 0


def try_command(work: Callable[[], int], folder: Path, *, timeout_s: float = TIMEOUT_S) -> Trial:
    """Call a function in a forked process with a folder as its working directory.

    Args:
        work: Returns an exit code.
        folder: The folder; `folder.out` and `folder.err` beside it get what is printed.
    """
    outputs = [folder.with_name(folder.name + ending) for ending in (".out", ".err")]
    started, began_kb = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pid = os.fork()
    if not pid:
        _child(work, folder, outputs)
    deadline, status = started + timeout_s, None
    while status is None:
        done, found, used = os.wait4(pid, os.WNOHANG)
        if done:
            status = found
        elif time.monotonic() > deadline:
            break
        else:
            time.sleep(0.002)
    _end_group(pid)
    if status is None:
        used = os.wait4(pid, 0)[2]
    seconds = time.monotonic() - started
    said = tuple(output.read_text(encoding="utf-8", errors="surrogateescape") for output in outputs)
    for output in outputs:
        output.unlink()
    code = -1 if status is None else os.waitstatus_to_exitcode(status)
    plain = tuple(_VARYING.sub("", text) for text in said)
    ending = _ending(status is None or used.ru_utime + used.ru_stime > MOST_CPU_S - 1, code, said[0] + said[1])
    return Trial(ending, code, (plain[0], plain[1]), not _FORGED.search(said[1]), seconds,
                 used.ru_utime + used.ru_stime, (used.ru_maxrss - began_kb) // 1000)


def _ending(is_hung: bool, code: int, error: str) -> str:
    if is_hung:
        return "hang"
    if code < 0:
        return "killed"
    if "Traceback (most recent call last)" in error or code == _CRASHED:
        return "traceback"
    if code == 0:
        return "done"
    return "refused" if re.search(r"^(error|damaged|dsv3 .*: error):? ", error, re.MULTILINE) or "damaged" in error \
        or "DAMAGED" in error else "mute"


def _child(work: Callable[[], int], folder: Path, outputs: list[Path]) -> None:
    code = _CRASHED
    try:
        os.setsid()
        for number, name in ((signal.SIGTERM, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
            signal.signal(number, name)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for descriptor, output in zip((1, 2), outputs, strict=True):
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            setattr(sys, name, open(descriptor, "w", encoding="utf-8", closefd=False))
        prepare_streams()
        os.chdir(folder)
        limit = _virtual_bytes() + LIMIT_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (MOST_CPU_S, MOST_CPU_S))
        try:
            code = work()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:  # noqa: BLE001 - it is what is looked for
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _virtual_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _end_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return
