"""Ranks of a rehearsal, forked from one process that has imported what all of them need.

`rank_processes.py` starts it as `python -m dsv3_megatron.rehearsal.forked_ranks FOLDER NUM`, with the CUDA runtime of
`device_library.py` preloaded. FOLDER has tasks.json; so many ranks run at a time, each in a process of its own, in
which nothing has run before. Each leaves rankR.json, or rankR.log with why there is none and its status in rankR.ended.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dsv3_megatron.process.parent import end_with_parent, freeze_before_forks
from dsv3_megatron.rehearsal.rank_results import RankTask
from dsv3_megatron.rehearsal.rehearsed_rank import environment, rehearse_to_file

TASKS = "tasks.json"
_IMPORTED = ("dsv3_megatron.runs.trainer", "torch._dynamo",
             "torch.testing._internal.distributed.fake_pg")


def main(arguments: Sequence[str], prepare_rank: Callable[[RankTask], None] | None = None) -> int:
    """Rehearse the ranks of FOLDER's tasks.

    Args:
        arguments: FOLDER and NUM.
        prepare_rank: Called in each rank's process first; None: nothing is.

    Returns:
        0; or 2 if the run cannot be, when the others have been ended. A rank that died ends no other one.
    """
    end_with_parent()
    folder, num_processes = Path(arguments[0]), int(arguments[1])
    content = json.loads((folder / TASKS).read_text(encoding="utf-8"))
    tasks = [RankTask(**{**task, "arguments": tuple(task["arguments"])}) for task in content]
    _import()
    running: dict[int, RankTask] = {}
    try:
        for task in tasks:
            if len(running) >= num_processes and _wait_for_one(running, folder) == 2:
                return 2
            running[_fork(task, folder, prepare_rank)] = task
        while running:
            if _wait_for_one(running, folder) == 2:
                return 2
    finally:
        for pid in running:
            os.kill(pid, signal.SIGKILL)
    return 0


def _import() -> None:
    """Import what ranks need. CUDA must not be asked here even whether it is there: torch takes no fork after that."""
    from dsv3_megatron.platform.notices import drop_known_notices
    from dsv3_megatron.rehearsal.stand_ins import while_importing

    drop_known_notices()
    with while_importing():
        for name in _IMPORTED:
            importlib.import_module(name)
    freeze_before_forks()


def _wait_for_one(running: dict[int, RankTask], folder: Path) -> int:
    """Wait until a rank has ended; its exit status, below 0 of one that a signal ended."""
    pid, status = os.wait()
    task, code = running.pop(pid), os.waitstatus_to_exitcode(status)
    if code:
        (folder / f"rank{task.rank}.ended").write_text(f"{code}", encoding="utf-8")
    return code


def _fork(task: RankTask, folder: Path, prepare_rank: Callable[[RankTask], None] | None) -> int:
    """Start a rank; returns its process id."""
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        end_with_parent(parent)
        log = os.open(folder / f"rank{task.rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(environment(task))
        if prepare_rank is not None:
            prepare_rank(task)
        code = rehearse_to_file(task, folder / f"rank{task.rank}.json")
    except BaseException:  # noqa: BLE001 - told by the process that started this one
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
