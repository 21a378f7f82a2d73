"""Rehearses several ranks, each in a process of its own with the CUDA runtime of `device_library.py` preloaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.output import json_text
from dsv3_megatron.config.slow_work import slow_work
from dsv3_megatron.rehearsal.device_library import require_cuda_build, runtime_library
from dsv3_megatron.rehearsal.forked_ranks import TASKS
from dsv3_megatron.rehearsal.rank_results import RankResult, RankTask, result_of_json
from dsv3_megatron.rehearsal.rehearsed_rank import environment

# Replaced by tests that plant a fault in the run before it.
RANKS_COMMAND = ("-m", "dsv3_megatron.rehearsal.forked_ranks")
_NUM_LAST_LINES = 12
_POLL_S = 0.5


def rehearse_ranks(tasks: Sequence[RankTask], *, num_processes: int, command: Sequence[str] = RANKS_COMMAND
                   ) -> list[RankResult]:
    """Rehearse ranks of one run, so many at a time.

    Args:
        tasks: What to rehearse, a rank each.
        num_processes: Ranks at a time.
        command: Arguments of Python that start the process that ranks are forked from.

    Raises:
        ConfigError: the run cannot be, or this machine cannot rehearse it.
        RuntimeError: the process that ranks are forked from died, with its last lines.
    """
    from torch.version import cuda

    require_cuda_build(cuda)
    library = runtime_library()
    variables = {**os.environ, "LD_PRELOAD": " ".join(filter(None, (str(library), os.environ.get("LD_PRELOAD")))),
                 "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "PYTHONWARNINGS": "ignore",
                 **environment(tasks[0])}
    variables.pop("TRITON_INTERPRET", None)  # a GPU's kernels are compiled, not interpreted on the host
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as name:
        folder = Path(name)
        (folder / TASKS).write_text(json_text([asdict(task) for task in tasks]), encoding="utf-8")
        with (folder / "log").open("wb") as output:
            process = subprocess.Popen([sys.executable, *command, str(folder), str(num_processes)], env=variables,
                                       stdout=output, stderr=subprocess.STDOUT)
            try:
                code = _wait(process, folder, len(tasks))
            finally:
                # After an error or a signal nobody waits for it; its ranks end with it.
                process.kill()
                process.wait()
        if code:
            _raise(folder, code)
        return [_result(task, folder) for task in tasks]


def _wait(process: subprocess.Popen[bytes], folder: Path, num_ranks: int) -> int:
    """Wait for the process that ranks are forked from; on a terminal with a bar of the ranks that are through."""
    with slow_work("rehearse", total=num_ranks, unit="rank") as work:
        while True:
            try:
                return process.wait(timeout=_POLL_S)
            except subprocess.TimeoutExpired:
                work.reach(len({file.stem for ending in ("json", "ended") for file in folder.glob(f"rank*.{ending}")}))


def _raise(folder: Path, code: int) -> None:
    """Raise what ended the rehearsal of all ranks."""
    for file in sorted(folder.glob("rank*.log")):
        if code == 2 and (lines := _last_lines(file)) and lines[-1].startswith("error: "):
            raise ConfigError(lines[-1].removeprefix("error: "))
    raise RuntimeError(f"the process that ranks are forked from ended with status {code}:\n"
                       + "\n".join(_last_lines(folder / "log")))


def _result(task: RankTask, folder: Path) -> RankResult:
    """What a rank left; of one that died, that it did."""
    result = folder / f"rank{task.rank}.json"
    if result.exists():
        return result_of_json(json.loads(result.read_text(encoding="utf-8")))
    status = (folder / f"rank{task.rank}.ended").read_text(encoding="utf-8")
    why = f"was ended by signal {-int(status)}" if int(status) < 0 else f"ended with status {status}"
    return RankResult(task.rank, failure="\n  ".join([
        f"its process {why}", *_last_lines(folder / f"rank{task.rank}.log")]))


def _last_lines(file: Path) -> list[str]:
    if not file.exists():
        return []
    return file.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-_NUM_LAST_LINES:]
