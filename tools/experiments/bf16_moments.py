"""AdamW's moments in fp32, in bf16 rounded to nearest and in bf16 rounded stochastically, on the same data.

The question is whether 4 bytes of moments a parameter instead of 8 cost loss; DeepSeek-V3 uses them "without incurring
observable performance degradation" (report, section 3.3.1). What to compare a difference with is the range over seeds.

Usage:
    python tools/experiments/bf16_moments.py --preset tiny --data-path PREFIX --valid-data-path PREFIX --work DIR \\
        --seeds 1 2 3 --output docs/experiments/bf16_moments -- --train-iters 200
writes docs/experiments/bf16_moments.csv and .png, and prints a table of the last losses.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.experiments.variants import Curve, mean_by_step, train_variants, write_table

FP32 = "fp32"
_BF16 = ["--exp-avg-dtype", "bf16", "--exp-avg-sq-dtype", "bf16", "--moment-rounding"]
VARIANTS: dict[str, list[str]] = {
    FP32: ["--exp-avg-dtype", "fp32", "--exp-avg-sq-dtype", "fp32"],
    "bf16, nearest": [*_BF16, "nearest"],
    "bf16, stochastic": [*_BF16, "stochastic"],
}
_COLOURS = ("#2a6fb0", "#c2410c", "#0f766e")
_LAST_STEPS = 10


def last_loss(curve: Curve) -> float:
    """Training loss, mean over the last steps."""
    return statistics.fmean(value for _, value in curve.records.column("lm_loss")[-_LAST_STEPS:])


def summary(curves: Sequence[Curve]) -> str:
    """A line a variant: losses of each seed, and the mean difference from fp32 with the same seed."""
    lines = [f"| moments | validation loss by seed | training loss, last {_LAST_STEPS} steps | difference from fp32 |",
             "| --- | --- | --- | ---: |"]
    reference = {curve.seed: last_loss(curve) for curve in curves if curve.variant == FP32}
    for name in VARIANTS:
        mine = [curve for curve in curves if curve.variant == name]
        validation = [curve.records.validation_column("lm_loss")[-1][1] for curve in mine]
        training = [last_loss(curve) for curve in mine]
        difference = statistics.fmean(last_loss(curve) - reference[curve.seed] for curve in mine)
        lines.append(f"| {name} | {_numbers(validation)} | {_numbers(training)} | {difference:+.4f} |")
    return "\n".join(lines)


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)


def plot(curves: Sequence[Curve], path: Path, title: str) -> None:
    """Training loss against steps, and its difference from fp32 with the same seed; the seeds' range as a band."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), dpi=130, layout="constrained")
    reference = {curve.seed: dict(curve.records.column("lm_loss")) for curve in curves if curve.variant == FP32}
    for name, colour in zip(VARIANTS, _COLOURS, strict=True):
        steps, means, lows, highs = zip(*mean_by_step(curves, name, "lm_loss"), strict=True)
        left.plot(steps, means, label=name, color=colour, linewidth=1.2)
        left.fill_between(steps, lows, highs, color=colour, alpha=0.12, linewidth=0)
        if name == FP32:
            continue
        gaps = [{step: loss - reference[curve.seed][step] for step, loss in curve.records.column("lm_loss")}
                for curve in curves if curve.variant == name]
        right.plot(steps, [statistics.fmean(gap[step] for gap in gaps) for step in steps], color=colour, linewidth=1.2)
        right.fill_between(steps, [min(gap[step] for gap in gaps) for step in steps],
                           [max(gap[step] for gap in gaps) for step in steps], color=colour, alpha=0.12, linewidth=0)
    left.set_ylabel("training loss, nats per token")
    right.set_ylabel("difference from fp32 moments, same seed")
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.grid(color="#e5e7eb")
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(fontsize=8, frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    figure.savefig(path)
    plt.close(figure)


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
    write_table(curves, options.output.with_suffix(".csv"), columns=("lm_loss",), every=options.every)
    plot(curves, options.output.with_suffix(".png"),
         f"Moments in fp32 and bf16, {options.preset}, {len(options.seeds)} seed{'s' * (len(options.seeds) > 1)}")
    print(summary(curves))


if __name__ == "__main__":
    main()
