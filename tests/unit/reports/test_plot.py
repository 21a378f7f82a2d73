"""The plot is written for runs of any length and refuses an empty one."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_megatron.metrics.run_records import RunRecords
from dsv3_megatron.reports.plot import plot_run, smooth


def run(num_steps: int) -> RunRecords:
    steps = [{"kind": "step", "iteration": i, "consumed_tokens": 4096 * i, "lm_loss": 3 + 5 * math.exp(-i / 30),
              "mtp_losses": [3.5 + 5 * math.exp(-i / 30)], "grad_norm": 1 / i, "learning_rate": 1e-3,
              "max_violation": 0.5} for i in range(1, num_steps + 1)]
    return RunRecords(steps, [{"kind": "validation", "iteration": num_steps, "lm_loss": 3.5}])


@pytest.mark.parametrize("num_steps", [1, 300])
def test_png_is_written(tmp_path: Path, num_steps: int) -> None:
    path = tmp_path / "loss.png"
    plot_run(run(num_steps), path, title="a run", baselines={"unigram": 6.4, "bigram": 4.5})
    from PIL import Image

    with Image.open(path) as image:
        assert image.size[0] > 1000 and image.format == "PNG"
        colors = image.convert("RGB").resize((200, 144)).getcolors(30_000)
        assert colors is not None and len(colors) > 20  # not blank


def test_steps_that_measured_nothing_else(tmp_path: Path) -> None:
    records = RunRecords([{"kind": "step", "iteration": 1, "consumed_tokens": 10, "lm_loss": 2.0, "mtp_losses": [None]},
                          {"kind": "step", "iteration": 2, "consumed_tokens": 15, "lm_loss": None}], [])
    plot_run(records, tmp_path / "loss.png")


def test_nothing_to_plot(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no step with a finite lm_loss"):
        plot_run(RunRecords([], []), tmp_path / "loss.png")


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=50), st.integers(1, 20))
def test_smoothing_is_a_mean_around_each_point(values: list[float], window: int) -> None:
    smoothed = smooth(values, window)
    assert len(smoothed) == len(values)
    for index, value in enumerate(smoothed):
        reach = min(window // 2, index, len(values) - 1 - index)
        around = values[index - reach:index + reach + 1]
        assert value == pytest.approx(sum(around) / len(around), abs=1e-9)
