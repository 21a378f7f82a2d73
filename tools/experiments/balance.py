"""Balancing experts: bias alone, bias and sequence loss (DeepSeek-V3's), auxiliary loss alone, nothing.

The question is the papers' (Loss-Free Balancing, arXiv 2408.15664; DeepSeek-V3 report, section 4.5): does the bias
balance without costing loss? Measured are the max-violation of each step, max over experts of load / mean load - 1,
mean over the MoE layers, and the validation loss.

Usage:
    python -m tools.experiments.balance --preset tiny --data-path PREFIX --valid-data-path PREFIX --work DIR \\
        --seeds 1 2 3 --output docs/experiments/balance_tiny -- --train-iters 200
writes docs/experiments/balance_tiny.csv and .png, and prints the table of the last steps.
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, write the table and the picture, print the summary."""
    parser = experiment_parser(__doc__)
    parser.add_argument("--every", type=int, default=2, help="steps between rows of the table")
    options = parser.parse_args(arguments)
    curves = train_variants(VARIANTS, common=common_flags(options), seeds=options.seeds, work=options.work)
    write_table(curves, options.output.with_suffix(".csv"), columns=("lm_loss", "max_violation"), every=options.every)
    violations = {name: mean_by_step(curves, name, "max_violation") for name in VARIANTS}
    differences = {name: loss_differences(curves, name, NOTHING, window=_WINDOW) for name in VARIANTS}
    plot_bands([Panel("max-violation, mean over MoE layers", violations, is_logarithmic=True),
                Panel(f"loss less that of {NOTHING!r}, nats", differences)],
               dict(zip(VARIANTS, _COLOURS, strict=True)), options.output.with_suffix(".png"), preset=options.preset,
               seeds=options.seeds, subject="Expert balance")
    print(summary(curves))


if __name__ == "__main__":
    main()
