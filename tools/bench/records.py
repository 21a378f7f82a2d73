"""Rows of results: one measured number each, with everything needed to read it later."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

COLUMNS = ("name", "config", "metric", "value", "unit", "device", "versions", "commit", "date")
# Another folder where a GPU session collects what it measures (tools/gpu_session.py).
RESULTS = Path(os.environ.get("BENCH_RESULTS") or Path(__file__).parent / "results")


@dataclass(frozen=True)
class Measurement:
    """One number: of what (`name`), in which setting (`config`), which quantity, and its unit."""

    name: str
    config: str
    metric: str
    value: float
    unit: str


def append_rows(file_name: str, measurements: list[Measurement], device: str) -> Path:
    """Append measurements to a CSV file under results/ or $BENCH_RESULTS, with device, versions, commit and date.

    Args:
        file_name: Such as "training_throughput.csv".
        measurements: Any number.
        device: What they were measured on, with the number of threads.

    Returns:
        The file.
    """
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / file_name
    is_new = not path.exists()
    stamp = (device, versions(), commit(), datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"))
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if is_new:
            writer.writerow(COLUMNS)
        for m in measurements:
            writer.writerow((m.name, m.config, m.metric, f"{m.value:.6g}", m.unit, *stamp))
    return path


def versions() -> str:
    """Versions of the packages that decide about speed; of one that is not installed "none"."""
    found = []
    for name in ("torch", "triton", "megatron-core", "transformers", "tokenizers", "gigatoken"):
        try:
            found.append(f"{name}={importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name}=none")
    return " ".join(found)


def commit() -> str:
    """The repository's commit, "-dirty" where tracked files differ; "unknown" outside a repository."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def warn_of_load() -> None:
    """Say on stderr that other work disturbs what is measured, if it does."""
    if load_average() > 0.5:
        print(f"load average {load_average():.1f}: other work disturbs these numbers", file=sys.stderr)


def load_average() -> float:
    """Runnable processes of the last minute: a benchmark beside others is no benchmark."""
    return os.getloadavg()[0]
