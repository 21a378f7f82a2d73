"""Trains variants of one run on the same data with several seeds, and keeps their curves: what an experiment is.

An experiment names its variants as flags. Each (variant, seed) is a process of its own under the work folder; one that
has finished is not run again, so an experiment that was stopped goes on, and new variants cost only themselves.

Usage:
    curves = train_variants({"fp32": [], "bf16": ["--exp-avg-dtype", "bf16"]}, common=[...], seeds=[1, 2, 3], work=path)
    write_table(curves, Path("docs/experiments/name.csv"), columns=("lm_loss",), every=5)
"""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsv3_megatron.metrics.records import METRICS_FILE, Records, read_records

_FINISHED = "finished"


@dataclass(frozen=True)
class Curve:
    """What one process measured."""

    variant: str
    seed: int
    records: Records


def train_variants(variants: Mapping[str, Sequence[str]], *, common: Sequence[str], seeds: Iterable[int], work: Path,
                   ) -> list[Curve]:
    """Train every variant with every seed, seed by seed; the curves in that order.

    Args:
        variants: Name -> flags of `dsv3_megatron.train` that make it what it is.
        common: Flags of all of them.
        seeds: Of weights and data order.
        work: Folder for logs; one below it for each run.

    Raises:
        RuntimeError: a run failed; gives its log.
    """
    curves = []
    for seed in seeds:
        for name, flags in variants.items():
            folder = work / f"{name}-{seed}"
            command = [*common, *flags, "--seed", str(seed), "--tensorboard-dir", str(folder)]
            if not (folder / _FINISHED).exists() or (folder / _FINISHED).read_text() != " ".join(command):
                _train(command, folder)
            curves.append(Curve(name, seed, read_records(folder / METRICS_FILE)))
            losses = curves[-1].records.validation_column("lm_loss")
            print(f"{name}, seed {seed}: " + (f"validation loss {losses[-1][1]:.4f}" if losses else "done"), flush=True)
    return curves


def _train(command: list[str], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    with log.open("w", encoding="utf-8") as output:
        result = subprocess.run([sys.executable, "-m", "dsv3_megatron.train", *command], stdout=output,
                                stderr=subprocess.STDOUT, check=False)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with code {result.returncode}; see {log}")
    (folder / _FINISHED).write_text(" ".join(command))


def write_table(curves: Sequence[Curve], path: Path, *, columns: Sequence[str], every: int) -> None:
    """Every `every`-th step of each curve as CSV: variant, seed, iteration, columns; validations with kind=validation.

    Args:
        curves: From `train_variants`.
        path: Where to; its folder is made.
        columns: Names of a step's record. A validation has "lm_loss" alone.
        every: Steps between rows.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("variant", "seed", "kind", "iteration", *columns))
        for curve in curves:
            key = (curve.variant, curve.seed)
            for record in curve.records.steps:
                if record["iteration"] % every == 0:
                    values = (record.get(column) for column in columns)
                    writer.writerow((*key, "step", record["iteration"],
                                     *("" if value is None else f"{value:.6g}" for value in values)))
            for iteration, loss in curve.records.validation_column("lm_loss"):
                writer.writerow((*key, "validation", iteration,
                                 *(f"{loss:.6g}" if column == "lm_loss" else "" for column in columns)))


def mean_by_step(curves: Sequence[Curve], variant: str, column: str) -> list[tuple[int, float, float, float]]:
    """(iteration, mean, least, most) over the seeds of a variant, where all of them have a value."""
    per_seed = [dict(curve.records.column(column)) for curve in curves if curve.variant == variant]
    steps = sorted(set.intersection(*(set(values) for values in per_seed)))
    rows = []
    for step in steps:
        values = [seed[step] for seed in per_seed]
        rows.append((step, sum(values) / len(values), min(values), max(values)))
    return rows
