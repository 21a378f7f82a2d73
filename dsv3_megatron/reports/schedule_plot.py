"""Draws a run's recipe: learning rate, batch, loss weights and sequence length over the tokens of its phases.

Phases differ in length by thousands, so the axis is not to scale: every phase gets at least a tenth of the width that
phases of equal length would have together, and its tokens stand at its ends.
"""

from __future__ import annotations

import bisect
from typing import Any

from dsv3_megatron.config.recipe import PlannedPhase, Recipe
from dsv3_megatron.metrics.progress import compact

_LINE, _MUTED, _INK, _SHADE = "#2a6fb0", "#6b7280", "#1f2937", "#f3f4f6"
_POINTS = 200


def plot_schedule(recipe: Recipe, path: str, *, title: str = "") -> None:
    """Write a PNG of all phases.

    Args:
        recipe: Recipe of a validated run.
        path: File to write; its folder must exist.
        title: Heading of the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    edges = _edges(recipe)
    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#9ca3af",
             "axes.labelcolor": _INK, "xtick.color": _MUTED, "ytick.color": _MUTED, "font.family": "DejaVu Sans"}
    with plt.rc_context(style):
        figure, panels = plt.subplots(5, 1, figsize=(11, 8.5), dpi=150, sharex=True, layout="constrained",
                                      height_ratios=[2, 1.3, 1, 1, 1])
        points = [point for phase in recipe.phases for point in _points(phase, edges)]
        names = ("learning rate", "batch (sequences)", "MTP weight λ", "bias step γ", "sequence (tokens)")
        for number, (axes, name) in enumerate(zip(panels, names, strict=True), start=1):
            axes.plot([point[0] for point in points], [point[number] for point in points], color=_LINE, linewidth=1.8)
            axes.set_title(name, loc="left", color=_INK)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}" if value < 1 else f"{value:,.0f}")
            axes.set_ylim(bottom=0)
            for index in range(0, len(edges) - 1, 2):
                axes.axvspan(edges[index], edges[index + 1], color=_SHADE, zorder=0)
        panels[4].set_yscale("log", base=2)
        panels[4].set_ylim(min(point[5] for point in points) / 2, max(point[5] for point in points) * 2)
        panels[4].yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        for phase, left, right in zip(recipe.phases, edges, edges[1:], strict=False):
            panels[0].annotate(f"{phase.name}\n{phase.num_steps:,} steps", ((left + right) / 2, 1.0),
                               xycoords=("data", "axes fraction"), xytext=(0, 20 + 26 * (phase.index % 2)),
                               textcoords="offset points", ha="center", fontsize=8, color=_MUTED)
        tokens = [phase.start.tokens for phase in recipe.phases] + [recipe.phases[-1].end.tokens]
        panels[-1].set_xticks(edges, [compact(value, digits=4) if value else "0" for value in tokens])
        panels[-1].set_xlim(0, 1)
        scale = "" if _is_to_scale(recipe, edges) else " (not to scale)"
        panels[-1].set_xlabel(f"consumed tokens at the phases' ends{scale}")
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold", color=_INK)
        figure.savefig(path)
        plt.close(figure)


def _edges(recipe: Recipe) -> list[float]:
    """Places at which each phase begins on an axis from 0 to 1, and 1."""
    total = sum(phase.end.tokens - phase.start.tokens for phase in recipe.phases)
    widths = [max((phase.end.tokens - phase.start.tokens) / total, 0.1) for phase in recipe.phases]
    edges = [0.0]
    for width in widths:
        edges.append(edges[-1] + width / sum(widths))
    return edges


def _is_to_scale(recipe: Recipe, edges: list[float]) -> bool:
    """Whether every phase is as wide as its tokens make it."""
    end = recipe.phases[-1].end.tokens
    return all(abs(edge - phase.start.tokens / end) < 1e-9 for phase, edge in zip(recipe.phases, edges, strict=False))


def _points(phase: PlannedPhase, edges: list[float]) -> list[tuple[Any, ...]]:
    """Place on the axis, learning rate, batch, lambda, gamma and sequence length of steps spread over a phase.

    Steps at which something jumps have a neighbour drawn, so that a jump is upright.
    """
    first, last = phase.start.iteration, phase.end.iteration
    steps = {first + (last - first) * index // _POINTS for index in range(_POINTS)} | {last - 1}
    for plateau in phase.plateaus[1:]:
        steps |= {plateau.iteration - 1, plateau.iteration}
    warmup = phase.learning_rate.warmup_iters
    steps |= {first + warmup * index // 8 for index in range(9)} if warmup else set()
    starts = [plateau.iteration for plateau in phase.plateaus]
    left, width = edges[phase.index], edges[phase.index + 1] - edges[phase.index]
    points: list[tuple[Any, ...]] = []
    for step in sorted(step for step in steps if first <= step < last):
        plateau = phase.plateaus[bisect.bisect_right(starts, step) - 1]
        size = plateau.global_batch_size * phase.training.seq_length
        tokens = plateau.tokens + (step - plateau.iteration) * size
        plan = phase.step(step, tokens)
        share = (tokens - phase.start.tokens) / (phase.end.tokens - phase.start.tokens)
        points.append((left + share * width, plan.learning_rate, plan.global_batch_size, plan.mtp_weight,
                       plan.bias_update_rate, phase.training.seq_length))
    return [*points, (left + width, *points[-1][1:])]
