"""AdamW's moments in fp32, in bf16 rounded to nearest and in bf16 rounded stochastically, on the same data.

The question is whether 4 bytes of moments a parameter instead of 8 cost loss; DeepSeek-V3 uses them "without incurring
observable performance degradation" (report, section 3.3.1). What to compare a difference with is the range over seeds.

Usage:
    python -m tools.experiments.bf16_moments --preset tiny --data-path PREFIX --valid-data-path PREFIX --work DIR \\
        --seeds 1 2 3 --output docs/experiments/bf16_moments -- --train-iters 200
writes docs/experiments/bf16_moments.csv and .png, and prints a table of the last losses.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from tools.experiments.variants import (
    Curve,
    Panel,
    common_flags,
    experiment_parser,
    loss_differences,
    mean_by_step,
    plot_bands,
    train_variants,
    write_table,
)

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


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, write the table and the picture, print the summary."""
    parser = experiment_parser(__doc__)
    parser.add_argument("--every", type=int, default=2, help="steps between rows of the table")
    options = parser.parse_args(arguments)
    curves = train_variants(VARIANTS, common=common_flags(options), seeds=options.seeds, work=options.work)
    write_table(curves, options.output.with_suffix(".csv"), columns=("lm_loss",), every=options.every)
    losses = {name: mean_by_step(curves, name, "lm_loss") for name in VARIANTS}
    differences = {name: loss_differences(curves, name, FP32) for name in VARIANTS if name != FP32}
    plot_bands([Panel("training loss, nats per token", losses),
                Panel("difference from fp32 moments, same seed", differences)],
               dict(zip(VARIANTS, _COLOURS, strict=True)), options.output.with_suffix(".png"), preset=options.preset,
               seeds=options.seeds, subject="Moments in fp32 and bf16")
    print(summary(curves))


if __name__ == "__main__":
    main()
