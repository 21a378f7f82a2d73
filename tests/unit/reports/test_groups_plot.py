"""The picture of several runs: what it draws is the mean and the range of the numbers that the runs wrote."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from dsv3_megatron.metrics.run_records import RunRecords
from dsv3_megatron.reports import groups_plot
from dsv3_megatron.reports.groups_plot import QUANTITIES, Quantity, bands_by_group, draw_groups, write_curves
from dsv3_megatron.reports.run_groups import RunGroup, SeededRun


def run(seed: int, shift: float, num_steps: int = 6, **extra: float) -> SeededRun:
    steps = [{"kind": "step", "iteration": step, "lm_loss": 9.0 / step + shift, **extra}
             for step in range(1, num_steps + 1)]
    return SeededRun(seed, Path("none"), RunRecords(steps, [
        {"kind": "validation", "iteration": num_steps, "lm_loss": 5.0 + shift}]))


GROUPS = [RunGroup("low", (run(1, 0.0), run(2, 1.0))), RunGroup("high", (run(1, 4.0, 4, grad_norm=2.0),))]


def test_a_band_is_the_mean_and_the_range_over_the_seeds() -> None:
    bands = bands_by_group(GROUPS, Quantity("lm_loss", ""))
    assert bands["low"][1] == (2, 5.0, 4.5, 5.5) and bands["high"][-1] == (4, 6.25, 6.25, 6.25)
    assert bands_by_group(GROUPS, Quantity("lm_loss", "", is_validation=True)) == {
        "low": [(6, 5.5, 5.0, 6.0)], "high": [(4, 9.0, 9.0, 9.0)]}
    assert set(bands_by_group(GROUPS, Quantity("grad_norm", ""))) == {"high"}


def test_what_is_drawn_are_these_bands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, path: (figures.append(self), save(self, path)))
    draw_groups(GROUPS, tmp_path / "curves.png", title="a study")
    assert (tmp_path / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    [figure] = figures
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "training loss, nats per token", "validation loss, nats per token", "gradient norm before clipping"]
    low, high = figure.axes[0].lines
    assert list(low.get_ydata()) == pytest.approx([9.0 / step + 0.5 for step in range(1, 7)])
    assert low.get_color() != high.get_color()
    edges = figure.axes[0].collections[0].get_paths()[0].vertices
    assert {(2.0, 4.5), (2.0, 5.5)} <= {tuple(point) for point in edges.tolist()}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["low (2 runs)", "high (1 run)"]


def test_more_settings_than_colours_stay_apart() -> None:
    styles = {(groups_plot.COLOURS[number % 7], groups_plot._LINES[number // 7 % 4]) for number in range(28)}
    assert len(styles) == 28


def test_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no step with a finite loss"):
        draw_groups([RunGroup("none", (SeededRun(1, tmp_path, RunRecords([], [])),))], tmp_path / "x.png")


def test_the_curves_as_a_table(tmp_path: Path) -> None:
    write_curves(GROUPS, tmp_path / "curves.csv")
    with (tmp_path / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["setting", "seed", "kind", "iteration", "lm_loss", "grad_norm"]
    assert len(rows) == 7 + 7 + 5 and rows[8] == {
        "setting": "low", "seed": "2", "kind": "step", "iteration": "2", "lm_loss": "5.5", "grad_norm": ""}
    assert {row["setting"] for row in rows if row["grad_norm"]} == {"high"}
    assert {quantity.column for quantity in QUANTITIES} >= {"lm_loss", "grad_norm"}
