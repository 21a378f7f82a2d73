"""The memory estimate against the rehearsal: `estimate_memory` of a rank of a GPU run, and what its code does.

Each case is one `dsv3 rehearse` of a preset at its full size, in one precision under one schedule, as the first, an
inner and the last rank of its pipeline. No GPU is needed. A rank of dsv3-16b takes about half a minute of one core, one
of dsv3-671b one to three minutes.

Usage:
    python -m tools.bench.bench_rehearsal [--presets dsv3-16b dsv3-671b] [--precisions bf16 fp8]
        [--schedules 1f1b dualpipe dualpipev] [--positions 0 1 3]
appends to tools/bench/results/rehearsal.csv and prints a table.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
from tools.bench.records import Measurement, append_rows  # noqa: E402

PRECISIONS = {"bf16": ("--fp8", "none"), "fp8": ("--fp8", "blockwise")}
SCHEDULES = ("1f1b", "dualpipe", "dualpipev")


@dataclass(frozen=True)
class Layout:
    """A preset's processes.

    Attributes:
        world_size: Processes of the run.
        num_stages: Pipeline ranks.
        positions: Pipeline ranks that are rehearsed.
        flags: Flags of the run beside precision and schedule.
    """

    world_size: int
    num_stages: int
    positions: tuple[int, ...]
    flags: tuple[str, ...]


LAYOUTS = {
    "dsv3-16b": Layout(32, 4, (0, 1, 3), ("--pipeline-model-parallel-size", "4")),
    # The report's layout and what it computes again.
    "dsv3-671b": Layout(2048, 16, (0, 2, 15), ("--recompute-granularity", "selective")),
}


def rehearse(preset: str, precision: str, schedule: str, positions: Sequence[int]) -> list[dict[str, Any]]:
    """Rehearse ranks of a preset; what `dsv3 rehearse --json` says of each.

    Raises:
        RuntimeError: the command did not come to its end, or a rank.
    """
    layout = LAYOUTS[preset]
    per_stage = layout.world_size // layout.num_stages
    done = subprocess.run(
        [sys.executable, "-m", "dsv3_megatron", "rehearse", "--preset", preset, "--world-size", str(layout.world_size),
         "--ranks", *(str(position * per_stage) for position in positions), "--processes", "1", "--json",
         *layout.flags, "--pipeline-schedule", schedule, *PRECISIONS[precision]],
        capture_output=True, text=True, cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{preset}, {precision}, {schedule}: {done.stderr.strip()}")
    ranks = json.loads(done.stdout)["ranks"]
    failures = [rank["failure"] for rank in ranks if rank["failure"] is not None]
    if failures:
        raise RuntimeError(f"{preset}, {precision}, {schedule}: {failures[0]}")
    return ranks


def rows_of(preset: str, precision: str, schedule: str, rank: dict[str, Any]) -> list[Measurement]:
    """A rank's rows: its peak, and what of it is not there between steps, each as rehearsed and as estimated."""
    layout = LAYOUTS[preset]
    config = (f"{preset} ranks={layout.world_size} stages={layout.num_stages} precision={precision} "
              f"stage={rank['pipeline_rank']}")
    passes = [part for part in rank["components"] if part["name"] not in ("parameters", "gradients", "optimizer")]
    return [Measurement(schedule, config, metric, size / 2**30, "GiB") for metric, size in (
        ("peak", rank["peak_bytes"]), ("peak_estimated", rank["planned_peak_bytes"]),
        ("beyond_state", sum(part["bytes"] for part in passes)),
        ("beyond_state_estimated", sum(part["planned_bytes"] for part in passes)))]


def main() -> None:
    """Rehearse, compare, print a table, write the results."""
    from dsv3_megatron.platform import prepare

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", choices=tuple(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--precisions", nargs="+", choices=tuple(PRECISIONS), default=list(PRECISIONS))
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=list(SCHEDULES))
    parser.add_argument("--positions", nargs="+", type=int, metavar="P", help="pipeline ranks (default: first, an "
                        "inner one, last)")
    options = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr):
        name = prepare().name
    print("| Model | Precision | Schedule | pipeline rank | estimated | rehearsed | difference |\n"
          "| --- | --- | --- | ---: | ---: | ---: | ---: |", flush=True)
    for preset in options.presets:
        for precision in options.precisions:
            for schedule in options.schedules:
                rows = []
                for rank in rehearse(preset, precision, schedule, options.positions or LAYOUTS[preset].positions):
                    own = rows_of(preset, precision, schedule, rank)
                    peak, estimated = own[0].value, own[1].value
                    print(f"| {preset} | {precision} | {schedule} | {rank['pipeline_rank']} | {estimated:.2f} GiB | "
                          f"{peak:.2f} GiB | {estimated / peak - 1:+.2%} |", flush=True)
                    rows += own
                append_rows("rehearsal.csv", rows, f"no GPU, tensors without values: {name}")


if __name__ == "__main__":
    main()
