"""Rehearses several ranks, each in a process of its own with the CUDA runtime of `device_library.py` preloaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.output import json_text
from dsv3_megatron.rehearsal.device_library import require_cuda_build, runtime_library
from dsv3_megatron.rehearsal.rehearsed_rank import RankResult, RankTask, result_of_json

# Replaced by tests that plant a fault in the run before it.
RANK_COMMAND = ("-m", "dsv3_megatron.rehearsal.rehearsed_rank")
_NUM_LAST_LINES = 12


def rehearse_ranks(jobs: Sequence[RankTask], *, num_processes: int, command: Sequence[str] = RANK_COMMAND
                   ) -> list[RankResult]:
    """Rehearse ranks, so many at a time.

    Args:
        jobs: What to rehearse, a rank each.
        num_processes: Processes at a time.
        command: Arguments of Python that start a rank.

    Raises:
        ConfigError: the run cannot be, or this machine cannot rehearse it.
        RuntimeError: a rank's process died, with its last lines.
    """
    from torch.version import cuda

    require_cuda_build(cuda)
    library = runtime_library()
    running: list[subprocess.Popen[Any]] = []
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as folder, ThreadPoolExecutor(num_processes) as pool:
        try:
            return list(pool.map(lambda job: _rehearse(job, Path(folder), library, command, running), jobs))
        finally:
            # After an error or a signal nobody waits for the others.
            pool.shutdown(wait=False, cancel_futures=True)
            for process in running:
                process.kill()


def _rehearse(job: RankTask, folder: Path, library: Path, command: Sequence[str], running: list[Any]) -> RankResult:
    wanted, result, log = (folder / f"rank{job.rank}.{kind}" for kind in ("job", "json", "log"))
    wanted.write_text(json_text(asdict(job)), encoding="utf-8")
    variables = {**os.environ, "LD_PRELOAD": " ".join(filter(None, (str(library), os.environ.get("LD_PRELOAD")))),
                 "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "PYTHONWARNINGS": "ignore"}
    with log.open("wb") as output:
        process = subprocess.Popen([sys.executable, *command, str(wanted), str(result)], env=variables, stdout=output,
                                   stderr=subprocess.STDOUT)
        running.append(process)
        code = process.wait()
    running.remove(process)
    if code == 0:
        return result_of_json(json.loads(result.read_text(encoding="utf-8")))
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    if code == 2 and lines and lines[-1].startswith("error: "):
        raise ConfigError(lines[-1].removeprefix("error: "))
    raise RuntimeError(f"the process of rank {job.rank} ended with status {code}:\n"
                       + "\n".join(lines[-_NUM_LAST_LINES:]))
