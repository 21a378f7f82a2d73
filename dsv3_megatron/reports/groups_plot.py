"""Several runs in one picture: a curve for each setting, its mean over the seeds, and their range as a band.

Usage:
    groups, remarks = read_groups([Path("runs/learning-rate")])
    draw_groups(groups, Path("curves.png"), title="learning rate")
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3_megatron.reports.plot import INK, STYLE, smooth, smoothing_window
from dsv3_megatron.reports.run_groups import Band, RunGroup, band_of

# Apart for every kind of colour vision (Okabe and Ito), dark enough on white; then the same with other lines.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6b7280")
_LINES = ("-", "--", ":", "-.")
_MOST_PANELS = 4


@dataclass(frozen=True)
class Quantity:
    """A quantity that a panel shows.

    Attributes:
        column: Name of it in metrics.jsonl.
        label: Text at the axis, with the unit.
        is_validation: Whether the quantity is of validations, not of steps.
        is_logarithmic: Whether the axis of its panel is logarithmic.
    """

    column: str
    label: str
    is_validation: bool = False
    is_logarithmic: bool = False


QUANTITIES = (
    Quantity("grpo/reward", "reward of the rollouts"),
    Quantity("grpo/reward", "reward of the likeliest answers, validation", is_validation=True),
    Quantity("lm_loss", "training loss, nats per token"),
    Quantity("lm_loss", "validation loss, nats per token", is_validation=True),
    Quantity("max_violation", "expert max-violation, mean over layers"),
    Quantity("grad_norm", "gradient norm before clipping", is_logarithmic=True),
)


def draw_groups(groups: Sequence[RunGroup], path: str | Path, *, title: str = "",
                quantities: Sequence[Quantity] = QUANTITIES) -> None:
    """Write a PNG with up to four panels, those of the quantities that the runs have.

    Args:
        groups: The runs, by setting.
        path: File to write; its folder must exist.
        title: Heading of the picture.
        quantities: What may be shown, in the order of their importance.

    Raises:
        ValueError: the runs have none of it.
    """
    panels = [(quantity, bands) for quantity in quantities if (bands := bands_by_group(groups, quantity))]
    if not panels:
        raise ValueError("the runs have no step with a finite loss; there is nothing to draw")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = panels[:_MOST_PANELS]
    columns = 1 if len(panels) == 1 else 2
    rows = -(-len(panels) // columns)
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(5.6 * columns, 3.7 * rows + 0.6), dpi=130, layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
        for place, (quantity, bands) in enumerate(panels, start=1):
            _draw_panel(figure.add_subplot(rows, columns, place), quantity, bands, [group.name for group in groups])
        handles = {label: handle for axes in figure.axes
                   for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        shown = {group.name: f"{group.name} ({_seeds(group)})" for group in groups if group.name in handles}
        figure.legend([handles[name] for name in shown], list(shown.values()), loc="outside lower center",
                      ncols=2 if max(map(len, shown.values())) > 30 else 3, frameon=False, fontsize=9, labelcolor=INK)
        figure.savefig(str(path))
        plt.close(figure)


def bands_by_group(groups: Sequence[RunGroup], quantity: Quantity) -> dict[str, Band]:
    """The band of a quantity for each group that has it, by the group's name; steps are smoothed run by run."""
    found = {}
    for group in groups:
        curves = [_smoothed(run.column(quantity.column, is_validation=quantity.is_validation),
                            is_smooth=not quantity.is_validation) for run in group.runs]
        band = band_of([curve for curve in curves if curve])
        if band:
            found[group.name] = band
    return found


def write_curves(groups: Sequence[RunGroup], path: Path, *, quantities: Sequence[Quantity] = QUANTITIES) -> None:
    """Every step and validation of every run as CSV: setting, seed, kind, iteration, and the quantities' columns.

    Args:
        groups: The runs, by setting.
        path: File to write; its folder must exist.
        quantities: What the columns are; those that no run has are left out.
    """
    columns = [column for column in dict.fromkeys(quantity.column for quantity in quantities)
               if any(run.column(column) or run.column(column, is_validation=True)
                      for group in groups for run in group.runs)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("setting", "seed", "kind", "iteration", *columns))
        for group in groups:
            for run in group.runs:
                for record in (*run.records.steps, *run.records.validations):
                    values = (record.get(column) for column in columns)
                    writer.writerow((group.name, "" if run.seed is None else run.seed, record["kind"],
                                     record["iteration"],
                                     *("" if value is None else f"{value:.6g}" for value in values)))


# -- parts ---------------------------------------------------------------------------------------------


def _smoothed(points: Sequence[tuple[int, float]], *, is_smooth: bool) -> list[tuple[int, float]]:
    window = smoothing_window(len(points)) if is_smooth else 1
    return list(zip([step for step, _ in points], smooth([value for _, value in points], window), strict=True))


def _seeds(group: RunGroup) -> str:
    return f"{len(group.runs)} runs" if len(group.runs) > 1 else "1 run"


def _draw_panel(axes: Any, quantity: Quantity, bands: dict[str, Band], names: Sequence[str]) -> None:
    for name, band in bands.items():
        number = names.index(name)
        colour, line = COLOURS[number % len(COLOURS)], _LINES[number // len(COLOURS) % len(_LINES)]
        steps, means, least, most = zip(*band, strict=True)
        marker = "o" if quantity.is_validation or len(steps) == 1 else None
        axes.plot(steps, means, label=name, color=colour, linestyle=line, linewidth=1.5, marker=marker, markersize=4)
        axes.fill_between(steps, least, most, color=colour, alpha=0.15, linewidth=0)
        if len(steps) == 1:
            axes.vlines(steps, least, most, color=colour, alpha=0.5)
    axes.set_title(quantity.label, loc="left", fontsize=10, color=INK)
    axes.set_xlabel("iteration")
    if quantity.is_logarithmic:
        axes.set_yscale("log")
        for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            axis(lambda value, _: f"{value:.3g}")
