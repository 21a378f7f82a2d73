"""Balancing experts: bias alone, bias and sequence loss (DeepSeek-V3's), auxiliary loss alone, nothing.

The question is the papers' (Loss-Free Balancing, arXiv 2408.15664; DeepSeek-V3 report, section 4.5): does the bias
balance without costing loss? Measured are the max-violation of each step, max over experts of load / mean load - 1,
mean over the MoE layers, and the validation loss.

Usage:
    python tools/experiments/balance.py --preset tiny --data-path PREFIX --valid-data-path PREFIX --work DIR \\
        --seeds 1 2 3 --output docs/experiments/balance_tiny -- --train-iters 200
writes docs/experiments/balance_tiny.csv and .png, and prints the table of the last steps.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.experiments.variants import Curve, mean_by_step, train_variants, write_table

NOTHING = "nothing"
# Bias and sequence loss are a preset's own; what a variant leaves out is set to 0.
VARIANTS: dict[str, list[str]] = {
    "bias": ["--moe-aux-loss-coeff", "0"],
    "bias + sequence loss 1e-4": [],
    "auxiliary loss 1e-3": ["--moe-router-bias-update-rate", "0", "--moe-aux-loss-coeff", "1e-3"],
    "auxiliary loss 1e-2": ["--moe-router-bias-update-rate", "0", "--moe-aux-loss-coeff", "1e-2"],
    NOTHING: ["--moe-router-bias-update-rate", "0", "--moe-aux-loss-coeff", "0"],
}
_WINDOW = 10  # steps
_COLOURS = ("#2a6fb0", "#0f766e", "#c2410c", "#7a5ba6", "#6b7280")


def last_part(curve: Curve, share: float = 0.25) -> float:
    """Mean max-violation over the last share of the steps."""
    values = [value for _, value in curve.records.column("max_violation")]
    return statistics.fmean(values[-max(1, int(len(values) * share)):])


def summary(curves: Sequence[Curve]) -> str:
    """A line a variant: final validation loss and max-violation, mean and range over the seeds."""
    lines = ["| variant | seeds | validation loss | max-violation, last quarter |", "| --- | ---: | ---: | ---: |"]
    for name in VARIANTS:
        mine = [curve for curve in curves if curve.variant == name]
        losses = [curve.records.validation_column("lm_loss")[-1][1] for curve in mine]
        violations = [last_part(curve) for curve in mine]
        lines.append(f"| {name} | {len(mine)} | {_spread(losses)} | {_spread(violations)} |")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"


def plot(curves: Sequence[Curve], path: Path, title: str) -> None:
    """Max-violation, and training loss less that of no balancing, mean of `_WINDOW` steps; bands: the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), dpi=130, layout="constrained")
    for name, colour in zip(VARIANTS, _COLOURS, strict=True):
        violations, differences = mean_by_step(curves, name, "max_violation"), loss_differences(curves, name)
        for axes, rows in ((left, violations), (right, differences)):
            steps, means, lows, highs = zip(*rows, strict=True)
            axes.plot(steps, means, label=name, color=colour, linewidth=1.2)
            axes.fill_between(steps, lows, highs, color=colour, alpha=0.12, linewidth=0)
    left.set_ylabel("max-violation, mean over MoE layers")
    left.set_yscale("log")
    left.legend(fontsize=8, frameon=False)
    right.set_ylabel(f"loss less that of {NOTHING!r}, nats")
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.grid(color="#e5e7eb")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    figure.savefig(path)
    plt.close(figure)


def loss_differences(curves: Sequence[Curve], variant: str) -> list[tuple[int, float, float, float]]:
    """(iteration, mean, least, most) over the seeds of the loss less that of no balancing, mean of `_WINDOW` steps."""
    reference = {curve.seed: dict(curve.records.column("lm_loss")) for curve in curves if curve.variant == NOTHING}
    differences = [[(step, loss - reference[curve.seed][step]) for step, loss in curve.records.column("lm_loss")]
                   for curve in curves if curve.variant == variant]
    rows = []
    for last in range(_WINDOW, len(differences[0]) + 1):
        values = [statistics.fmean(value for _, value in seed[last - _WINDOW:last]) for seed in differences]
        rows.append((differences[0][last - 1][0], statistics.fmean(values), min(values), max(values)))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, write the table and the picture, print the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--data-path", required=True, help="training data, PREFIX of .bin and .idx")
    parser.add_argument("--valid-data-path", required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs' logs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", type=Path, required=True, help="without ending; gets .csv and .png")
    parser.add_argument("--every", type=int, default=2, help="steps between rows of the table")
    parser.add_argument("flags", nargs="*", help="more flags of every run, after --")
    options = parser.parse_args(arguments)
    common = ["--preset", options.preset, "--data-path", options.data_path, "--valid-data-path",
              options.valid_data_path, *options.flags]
    curves = train_variants(VARIANTS, common=common, seeds=options.seeds, work=options.work)
    write_table(curves, options.output.with_suffix(".csv"), columns=("lm_loss", "max_violation"), every=options.every)
    plot(curves, options.output.with_suffix(".png"),
         f"Expert balance, {options.preset}, {len(options.seeds)} seed{'s' * (len(options.seeds) > 1)}")
    print(summary(curves))


if __name__ == "__main__":
    main()
