"""Draws a run: training and validation loss against what counting tokens achieves, and what went with them.

Usage:
    plot_run(read_records(directory / "metrics.jsonl"), "loss.png", title="tiny", baselines={"bigram": 4.1})
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsv3_megatron.metrics.progress import compact
from dsv3_megatron.metrics.run_records import RunRecords

TRAIN, VALIDATION, MTP, MUTED, INK = "#2a6fb0", "#c2410c", "#7a5ba6", "#6b7280", "#1f2937"
STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#9ca3af",
         "axes.labelcolor": INK, "xtick.color": MUTED, "ytick.color": MUTED, "axes.grid": True,
         "grid.color": "#e5e7eb", "grid.linewidth": 0.8, "axes.axisbelow": True, "font.family": "DejaVu Sans"}
_BASELINES = ("#8a8f98", "#4b5563", "#111827")


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean over `window` values around each position; fewer, but as many on both sides, near the ends.

    Centred, so that the smoothed curve does not lag behind the validation points.
    """
    sums = [0.0, *itertools.accumulate(values)]
    smoothed = []
    for index in range(len(values)):
        reach = min(window // 2, index, len(values) - 1 - index)
        smoothed.append((sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1))
    return smoothed


def plot_run(records: RunRecords, path: str | Path, *, title: str = "", baselines: Mapping[str, float] | None = None,
             ) -> None:
    """Write a PNG: loss on top; gradient norm, learning rate and expert balance below.

    Args:
        records: What the run measured; at least one step with a finite loss.
        path: File to write; its folder must exist.
        title: Heading of the picture.
        baselines: Name -> loss in nats per token on the validation data, drawn as dashed lines.

    Raises:
        ValueError: no step has a finite loss.
    """
    losses = records.column("lm_loss")
    if not losses:
        raise ValueError("records hold no step with a finite lm_loss; there is nothing to plot")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [(name, column, label) for name, column, label in (
        ("gradient norm", "grad_norm", ""), ("learning rate", "learning_rate", ""),
        ("expert max-violation", "max_violation", "mean over layers")) if records.column(column)]
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(10, 7.2), dpi=150, layout="constrained")
        grid = figure.add_gridspec(2, max(1, len(panels)), height_ratios=[2.4, 1])
        axes = figure.add_subplot(grid[0, :])
        _draw_losses(axes, records, baselines or {})
        axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK)
        for index, (name, column, note) in enumerate(panels):
            _draw_panel(figure.add_subplot(grid[1, index]), records.column(column), name, note)
        figure.savefig(str(path))
        plt.close(figure)


def smoothing_window(num_points: int) -> int:
    """Odd number of points to average, a fortieth of the run."""
    return num_points // 80 * 2 + 1


def _draw_losses(axes: Any, records: RunRecords, baselines: Mapping[str, float]) -> None:
    iterations, values = zip(*records.column("lm_loss"), strict=True)
    window = smoothing_window(len(values))
    if window > 1:
        axes.plot(iterations, values, color=TRAIN, alpha=0.25, linewidth=0.9)
    note = f", mean of {window} steps" if window > 1 else ""
    axes.plot(iterations, smooth(values, window), color=TRAIN, linewidth=1.8, label=f"training{note}")
    mtp = [(r["iteration"], r["mtp_losses"][0]) for r in records.steps
           if r.get("mtp_losses") and r["mtp_losses"][0] is not None]
    if mtp:
        steps, losses = zip(*mtp, strict=True)
        axes.plot(steps, smooth(losses, smoothing_window(len(losses))), color=MTP, linewidth=1.1, alpha=0.8,
                  label="MTP, one token further")
    validations = records.validation_column("lm_loss")
    if validations:
        steps, losses = zip(*validations, strict=True)
        axes.plot(steps, losses, color=VALIDATION, linewidth=1.2, marker="o", markersize=5, zorder=5,
                  markeredgecolor="white", label=f"validation, last {losses[-1]:.3f}")
    right = max(iterations[-1], iterations[0] + 1)
    for (name, loss), color in zip(sorted(baselines.items(), key=lambda item: -item[1]), _BASELINES, strict=False):
        axes.axhline(loss, color=color, linewidth=1.2, linestyle=(0, (5, 3)))
        axes.annotate(f"{name} {loss:.3f}", (right, loss), xytext=(-2, 3), textcoords="offset points", ha="right",
                      va="bottom", color=color, fontsize=9)
    axes.set_xlim(iterations[0] - 0.01 * right, right * 1.01)
    axes.set_xlabel("iteration")
    axes.set_ylabel("loss (nats per token)")
    _token_axis(axes, records)
    # Above the axes, beside the title: inside them every place is some run's curve or baseline.
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1.01, 1.085), ncols=3, fontsize=9, labelcolor=INK,
                borderaxespad=0, columnspacing=1.4, handlelength=1.6)


def _token_axis(axes: Any, records: RunRecords) -> None:
    """Trained tokens along the top, where the batch size is the same throughout."""
    per_step = {r["consumed_tokens"] / r["iteration"] for r in records.steps}
    if max(per_step) - min(per_step) > 0.001 * max(per_step):
        return
    tokens = max(per_step)
    top = axes.secondary_xaxis("top", functions=(lambda x: x * tokens, lambda x: x / tokens))
    top.xaxis.set_major_formatter(lambda value, _: compact(value) if value else "0")
    top.set_xlabel("trained tokens", color=MUTED, fontsize=9)
    top.spines["top"].set_visible(False)
    top.tick_params(length=0)


def _draw_panel(axes: Any, points: Sequence[tuple[int, float]], name: str, note: str) -> None:
    iterations, values = zip(*points, strict=True)
    window = smoothing_window(len(values)) if name != "learning rate" else 1
    if window > 1:
        axes.plot(iterations, values, color=MUTED, alpha=0.3, linewidth=0.8)
    axes.plot(iterations, smooth(values, window), color=TRAIN, linewidth=1.4)
    axes.set_title(name + (f" ({note})" if note else ""), loc="left", fontsize=10, color=INK)
    ordered = sorted(values)
    if name == "learning rate":
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
        axes.set_ylim(0)
    elif ordered[0] > 0 and ordered[-1] > 20 * ordered[len(ordered) // 2]:
        axes.set_yscale("log")
    else:
        axes.set_ylim(0)
    axes.set_xlabel("iteration")
