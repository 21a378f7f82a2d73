"""What the host and the network do in a step of a GPU run, counted by a rehearsal; before and after a change.

Counted, not timed, and on no GPU: tensors have shapes alone. A step is the first one of a run, so that what is made
once is in it.

Usage:
    python -m tools.bench.bench_rehearsed_step [--before REPORT.json] [-- FLAGS OF dsv3 rehearse]
prints the counts, and puts them into the column "after" of tools/bench/results/rehearsed_step.csv, in rows of their
own for each setting. `--before` takes the column "before" from a report that `dsv3 rehearse --json` printed at another
commit. Without flags it is the run of the report: DeepSeek-V3 on 2048 GPUs, a rank in the middle of the pipeline.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tools.bench.records import RESULTS, commit

COLUMNS = ("setting", "quantity", "before", "after", "commit", "device")
DEVICE = "no GPU: rehearsal on fake tensors"
REPORT_RUN = ("--preset", "dsv3-671b", "--pipeline-schedule", "dualpipev", "--fp8", "blockwise",
              "--recompute-granularity", "selective", "--global-batch-size", "4096", "--world-size", "2048",
              "--ranks", "300")
EXIT_FOUND = 1


def quantities(rank: Mapping[str, Any]) -> dict[str, float]:
    """The counts of a rehearsed rank's step, by name.

    Args:
        rank: The rank's part of the report that `dsv3 rehearse --json` prints.
    """
    waits, messages, launches = rank["waits"], rank["messages"], rank["launches"]

    def count(rows: Any) -> int:
        return sum(row["count"] for row in rows)

    exchanges = [row for row in messages if row["operation"] == "all_to_all"]
    widest = max((_group_size(row["group"]) for row in messages), default=0)
    return {
        "host waits": count(waits),
        "host waits in experts' layers": count(row for row in waits if row["line"].startswith(
            ("model/router", "model/token_dispatcher", "model/stage", "ops/experts", "ops/fp8", "kernels"))),
        "host waits for the gradient's norm": count(row for row in waits if row["line"].startswith("optim/update")),
        "copies without waiting": count(rank["copies"]),
        "kernels started, at least": sum(launches.values()),
        "messages": count(messages),
        "all-to-alls of tokens": count(exchanges),
        "bytes of all-to-alls": round(sum(row["count"] * row["mean_bytes"] for row in exchanges)),
        "all-reduces of the whole run": count(row for row in messages if row["operation"] == "all_reduce"
                                              and _group_size(row["group"]) == widest),
        "peak bytes": rank["peak_bytes"],
    }


def _group_size(group: str) -> int:
    """Ranks of a group, from its name in the report: "the group of 64 ranks (...)"."""
    return int(group.removeprefix("the group of ").split()[0])


def rehearse(flags: list[str]) -> dict[str, Any]:
    """The report of `dsv3 rehearse` with these flags.

    Raises:
        RuntimeError: The command failed, or a rank ended in an error.
    """
    done = subprocess.run([sys.executable, "-m", "dsv3_megatron", "rehearse", *flags, "--json"], capture_output=True,
                          text=True)
    if done.returncode not in (0, EXIT_FOUND):
        raise RuntimeError(done.stderr.strip()[-2000:])
    report = json.loads(done.stdout)
    failures = [f"rank {rank['rank']} in {rank['failed_in']}: {rank['failure']}" for rank in report["ranks"]
                if rank["failure"] is not None]
    if failures:
        raise RuntimeError("the rehearsal ended in an error, so its counts are of a part of a step: "
                           + "; ".join(failures))
    return report


def write(path: Path, setting: str, after: Mapping[str, float], before: Mapping[str, float] | None) -> None:
    """Put a setting's counts into the file; without `before` those that are there stay."""
    rows: list[dict[str, str]] = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    known = {row["quantity"]: row["before"] for row in rows if row["setting"] == setting}
    if before is not None:
        known = {name: str(value) for name, value in before.items()}
    rows = [row for row in rows if row["setting"] != setting]
    rows += [dict(zip(COLUMNS, (setting, name, known.get(name, ""), str(value), commit(), DEVICE), strict=True))
             for name, value in after.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    """Rehearse, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, metavar="REPORT.json", help="report of the same run at another commit")
    parser.add_argument("flags", nargs="*", help="flags of dsv3 rehearse, behind --")
    options = parser.parse_args()
    flags = options.flags or list(REPORT_RUN)
    (rank,) = rehearse(flags)["ranks"]
    after, before = quantities(rank), None
    if options.before is not None:
        (old,) = json.loads(options.before.read_text(encoding="utf-8"))["ranks"]
        before = quantities(old)
    for name, value in after.items():
        print(f"{name:<36} {before[name] if before else '':>14} {value:>14}")
    write(RESULTS / "rehearsed_step.csv", " ".join(flags), after, before)


if __name__ == "__main__":
    main()
