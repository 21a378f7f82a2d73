"""Trains variants of one run on the same data with several seeds, and keeps their curves: what an experiment is.

An experiment names its variants as flags. Each (variant, seed) is a process of its own under the work folder; one that
has finished is not run again, so an experiment that was stopped goes on, and new variants cost only themselves.

Usage:
    curves = train_variants({"fp32": [], "bf16": ["--exp-avg-dtype", "bf16"]}, common=[...], seeds=[1, 2, 3], work=path)
    write_table(curves, Path("docs/experiments/name.csv"), columns=("lm_loss",), every=5)
"""

from __future__ import annotations

import argparse
import csv
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsv3_megatron.metrics.run_records import METRICS_FILE, RunRecords, read_records
from dsv3_megatron.reports.run_groups import Band, band_of

_FINISHED = "finished"


@dataclass(frozen=True)
class Curve:
    """What one process measured."""

    variant: str
    seed: int
    records: RunRecords


@dataclass(frozen=True)
class Panel:
    """One of an experiment's axes: a band for each variant by name."""

    label: str
    bands: Mapping[str, Band]
    is_logarithmic: bool = False


def experiment_parser(description: str | None) -> argparse.ArgumentParser:
    """The command line that every experiment has; `common_flags` makes a run's flags of it."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--data-path", required=True, help="training data, PREFIX of .bin and .idx")
    parser.add_argument("--valid-data-path", required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs' logs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", type=Path, required=True, help="without ending, which the experiment adds")
    parser.add_argument("flags", nargs="*", help="more flags of every run, after --")
    return parser


def common_flags(options: argparse.Namespace) -> list[str]:
    """The flags that all runs of an experiment share."""
    return ["--preset", options.preset, "--data-path", options.data_path, "--valid-data-path",
            options.valid_data_path, *options.flags]


def train_variants(variants: Mapping[str, Sequence[str]], *, common: Sequence[str], seeds: Iterable[int], work: Path,
                   do: Callable[[list[str]], int] | None = None, told: str = "lm_loss") -> list[Curve]:
    """Train every variant with every seed, seed by seed; the curves in that order.

    Args:
        variants: Name -> flags of `dsv3_megatron.commands.train`, or words of `do`, that make it what it is.
        common: Flags of all of them.
        seeds: Of weights and data order.
        work: Folder for logs; one below it for each run.
        do: Function that does a run in this process, given its words, and returns its exit code; None: `dsv3 train` in
            a process of its own.
        told: Name of the validation's value that is printed of each run.

    Raises:
        RuntimeError: a run failed; gives its log.
    """
    curves = []
    for seed in seeds:
        for name, flags in variants.items():
            folder = work / f"{name}-{seed}"
            command = [*flags, *common, "--seed", str(seed), "--tensorboard-dir", str(folder)]
            if not (folder / _FINISHED).exists() or (folder / _FINISHED).read_text() != " ".join(command):
                _do(command, folder, do)
            curves.append(Curve(name, seed, read_records(folder / METRICS_FILE)))
            values = curves[-1].records.validation_column(told)
            print(f"{name}, seed {seed}: " + (f"validation {told} {values[-1][1]:.4f}" if values else "done"),
                  flush=True)
    return curves


def _do(command: list[str], folder: Path, do: Callable[[list[str]], int] | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    words = [*command, "--overwrite-run"]  # the folder is the experiment's own: what an unfinished run left goes
    if do is not None:
        code = do(words)
    else:
        with log.open("w", encoding="utf-8") as output:
            code = subprocess.run([sys.executable, "-m", "dsv3_megatron", "train", *words], stdout=output,
                                  stderr=subprocess.STDOUT, check=False).returncode
    if code:
        raise RuntimeError(f"{' '.join(command)} ended with code {code}" + (f"; see {log}" if do is None else ""))
    (folder / _FINISHED).write_text(" ".join(command))


def write_table(curves: Sequence[Curve], path: Path, *, columns: Sequence[str], every: int) -> None:
    """Every `every`-th step of each curve as CSV: variant, seed, iteration, columns; validations with kind=validation.

    Args:
        curves: From `train_variants`.
        path: Where to; its folder is made.
        columns: Names of values of a step's record. A validation has some of them: its loss, or its reward.
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
            for record in curve.records.validations:
                values = (record.get(column) for column in columns)
                writer.writerow((*key, "validation", record["iteration"],
                                 *("" if value is None else f"{value:.6g}" for value in values)))


def mean_by_step(curves: Sequence[Curve], variant: str, column: str, *, is_validation: bool = False) -> Band:
    """A column of a variant over its seeds, where all of them have a value; of its steps, or of its validations."""
    mine = [curve.records for curve in curves if curve.variant == variant]
    return band_of([records.validation_column(column) if is_validation else records.column(column) for records in mine])


def loss_differences(curves: Sequence[Curve], variant: str, base: str, *, window: int = 1, is_relative: bool = False
                     ) -> Band:
    """A variant's training loss less the base's with the same seed, mean over `window` steps; or as a share of it."""
    reference = {curve.seed: dict(curve.records.column("lm_loss")) for curve in curves if curve.variant == base}
    per_seed = []
    for curve in curves:
        if curve.variant == variant:
            exact = reference[curve.seed]
            gaps = [(step, (loss - exact[step]) / (exact[step] if is_relative else 1.0))
                    for step, loss in curve.records.column("lm_loss")]
            per_seed.append([(gaps[last - 1][0], statistics.fmean(gap for _, gap in gaps[last - window:last]))
                             for last in range(window, len(gaps) + 1)])
    return band_of(per_seed)


def plot_bands(panels: Sequence[Panel], colours: Mapping[str, str], path: Path, *, preset: str, seeds: Sequence[int],
               subject: str) -> None:
    """Write a PNG: panels side by side against the step, the legend in the first, the seeds' range as a band."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, all_axes = plt.subplots(1, len(panels), figsize=(11, 4.2), dpi=130, layout="constrained")
    for axes, panel in zip(all_axes, panels, strict=True):
        for name, rows in panel.bands.items():
            steps, means, lows, highs = zip(*rows, strict=True)
            axes.plot(steps, means, label=name, color=colours[name], linewidth=1.2)
            axes.fill_between(steps, lows, highs, color=colours[name], alpha=0.12, linewidth=0)
        axes.set_ylabel(panel.label)
        axes.set_xlabel("step")
        axes.grid(color="#e5e7eb")
        axes.spines[["top", "right"]].set_visible(False)
        if panel.is_logarithmic:
            axes.set_yscale("log")
    all_axes[0].legend(fontsize=8, frameon=False)
    title = f"{subject}, {preset}, {len(seeds)} seed{'s' * (len(seeds) > 1)}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    figure.savefig(path)
    plt.close(figure)
