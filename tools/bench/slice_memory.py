"""What the slice of DeepSeek-V3 of a GPU session takes before there is a GPU: as rehearsed, and as planned.

    python -m tools.bench.slice_memory        rehearses its runs (`dsv3 rehearse`, a minute or two each on a free core)
                                              and appends what they hold to results/slice_memory.csv

tools/bench/bench_fp8_slice.py compares what a GPU measures with both.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tools.bench.records import Measurement, append_rows

if TYPE_CHECKING:
    from dsv3_megatron.config.run import RunConfig

REPOSITORY = Path(__file__).resolve().parents[2]
FILE = "slice_memory.csv"
# In the repository, also where a session collects what it measures in another folder.
_TABLE = REPOSITORY / "tools" / "bench" / "results" / FILE
REHEARSED = "peak_memory_rehearsed"


def planned_bytes(run: RunConfig) -> int:
    """The planner's estimate of the peak of a run on one GPU, without the headroom that it leaves."""
    from dsv3_megatron.planning.memory.estimate import estimate_memory

    return max(rank.peak_bytes for rank in estimate_memory(run, 1))


def rehearsed_bytes(contender: str, config: str) -> float | None:
    """The newest rehearsed peak of a contender's run; None where that run has not been rehearsed."""
    if not _TABLE.is_file():
        return None
    with _TABLE.open(newline="", encoding="utf-8") as file:
        found = [float(row["value"]) for row in csv.DictReader(file)
                 if (row["name"], row["config"], row["metric"]) == (contender, config, REHEARSED)]
    return found[-1] * 1e9 if found else None


def rehearse(run: RunConfig) -> float:
    """Rehearse a run of one process; the bytes of live tensors at the peak.

    Raises:
        RuntimeError: the rehearsal ended in an error.
    """
    from dsv3_megatron.config.output import json_text

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.json"
        file.write_text(json_text({"preset": run.preset} | run.as_dict()), encoding="utf-8")
        done = subprocess.run([sys.executable, "-m", "dsv3_megatron", "rehearse", "--config", str(file), "--world-size",
                               "1", "--device-memory-gb", "150", "--json"], cwd=REPOSITORY, capture_output=True,
                              text=True, check=False)
    if done.returncode > 1:
        raise RuntimeError(f"the rehearsal ended with code {done.returncode}: {done.stderr[-2000:]}")
    return float(json.loads(done.stdout)["ranks"][0]["peak_bytes"])


def main() -> int:
    """Rehearse the runs of the session's slice and write down what they take."""
    from tools.bench import bench_fp8_slice
    from tools.gpu_session import SLICE

    options = bench_fp8_slice.parser().parse_args(list(SLICE))
    rows = []
    for name in options.contenders:
        run = bench_fp8_slice.slice_run(options, name, options.experts)
        config = bench_fp8_slice.config_text(options, run)
        rehearsed, planned = rehearse(run) / 1e9, planned_bytes(run) / 1e9
        print(f"{name}: {rehearsed:.2f} GB rehearsed, {planned:.2f} GB planned", flush=True)
        rows += [Measurement(name, config, REHEARSED, rehearsed, "GB"),
                 Measurement(name, config, "peak_memory_planned", planned, "GB")]
    print(f"written: {append_rows(FILE, rows, 'no GPU: rehearsed')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
