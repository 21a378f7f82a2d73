"""FP8 against BF16 and the report's ablations: variants of one run on the same data with the same seeds.

    fp8              the report's recipe
    other order      without FP8, one sequence at a time: sums in another order, so what rounding alone makes of a run
    block gradients  the report's negative control: output gradients in blocks of 128x128
    power of 2       all scales powers of two
    fp22             the tensor core's accumulator modelled, promotion every 128
    bf16 dispatch    tokens travel to their experts unrounded
    bf16 swiglu      the input of SwiGLU is kept unrounded for backward

The number of the report is the relative error of the loss against the run without FP8, below 0.25%; here the mean over
the last half of the steps of each seed. Everything runs on the reference backend.

Usage:
    python -m tools.experiments.fp8 --preset tiny --data-path PREFIX --valid-data-path PREFIX --work DIR \\
        --seeds 1 2 3 --output docs/experiments/fp8_tiny -- --precision bf16 --train-iters 150
writes docs/experiments/fp8_tiny.csv and .png and prints the table.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

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

BASE = "no fp8"
_FP8 = ["--fp8", "blockwise", "--fp8-backend", "reference"]
VARIANTS: dict[str, list[str]] = {
    BASE: [],
    "fp8": _FP8,
    "other order": ["--micro-batch-size", "1"],
    "block gradients": [*_FP8, "--fp8-grad-grouping", "block"],
    "power of 2": [*_FP8, "--fp8-power-of-2-scales"],
    "fp22": [*_FP8, "--fp8-accumulation", "fp22"],
    "bf16 dispatch": [*_FP8, "--fp8-dispatch", "bf16"],
    "bf16 swiglu": [*_FP8, "--fp8-swiglu-input", "bf16"],
}
_COLOURS = dict(zip(VARIANTS, ("#111827", "#dc2626", "#9ca3af", "#2563eb", "#059669", "#d97706", "#7c3aed",
                                "#0891b2"), strict=True))
# Steps over which the picture's differences are means.
_WINDOW = 20


def relative_errors(curve: Curve, base: Curve, share: float = 0.5) -> tuple[float, float]:
    """Mean of (loss / loss without FP8 - 1), and of its magnitude, over the last share of the steps."""
    losses, exact = dict(curve.records.column("lm_loss")), dict(base.records.column("lm_loss"))
    steps = sorted(losses.keys() & exact.keys())
    if not steps:
        raise ValueError(f"{curve.variant}, seed {curve.seed}: no step in common with {base.variant}; train both")
    last = steps[-max(1, int(len(steps) * share)):]
    errors = [losses[step] / exact[step] - 1 for step in last]
    return statistics.fmean(errors), statistics.fmean(map(abs, errors))


def draw(curves: Sequence[Curve], path: Path, preset: str) -> None:
    """Losses, and their relative differences from the run without FP8, of each variant over its seeds."""
    seeds = {name: sorted({curve.seed for curve in curves if curve.variant == name}) for name in VARIANTS}
    most = max(seeds.values(), key=len)
    labels = {name: name if found == most else f"{name} (seed {', '.join(map(str, found))})"
              for name, found in seeds.items() if found}
    losses = {label: mean_by_step(curves, name, "lm_loss") for name, label in labels.items()}
    differences = {label: [(step, 100 * mean, 100 * least, 100 * most) for step, mean, least, most in loss_differences(
        curves, name, BASE, window=_WINDOW, is_relative=True)] for name, label in labels.items() if name != BASE}
    plot_bands([Panel("training loss, nats per token", losses),
                Panel(f"% of the loss without FP8, mean of {_WINDOW} steps", differences)],
               {label: _COLOURS[name] for name, label in labels.items()}, path, preset=preset, seeds=most,
               subject="FP8 against BF16")


def summary(curves: Sequence[Curve]) -> str:
    """A line for each variant and seed."""
    base = {curve.seed: curve for curve in curves if curve.variant == BASE}
    lines = ["| variant | seed | relative loss error, last half: mean | of its magnitude |",
             "| --- | ---: | ---: | ---: |"]
    for curve in curves:
        if curve.variant != BASE:
            mean, magnitude = relative_errors(curve, base[curve.seed])
            lines.append(f"| {curve.variant} | {curve.seed} | {mean:+.3%} | {magnitude:.3%} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Train what is missing, write the curves, print the table."""
    parser = experiment_parser((__doc__ or "").split("\n\n")[0])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME",
                        help="some of them; the run without FP8 is always one")
    options = parser.parse_args(arguments)
    common = ["--log-interval", "1", *common_flags(options)]
    chosen = {name: flags for name, flags in VARIANTS.items() if name == BASE or name in options.variants}
    curves = train_variants(chosen, common=common, seeds=options.seeds, work=options.work)
    write_table(curves, options.output.with_suffix(".csv"), columns=("lm_loss", "grad_norm"), every=1)
    draw(curves, options.output.with_suffix(".png"), options.preset)
    print(summary(curves))
    return 0


if __name__ == "__main__":
    sys.exit(main())
