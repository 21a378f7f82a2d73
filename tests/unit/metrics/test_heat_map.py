"""Heat maps: colours mean loads, cells stand where they should, a run's history stays bounded."""

from __future__ import annotations

import numpy as np
import pytest

from dsv3_megatron.metrics.heat_map import Axis, LoadHistory, colours, draw_heat_map, relative_loads


def axis(name: str, count: int) -> Axis:
    return Axis(name, [str(index) for index in range(count)])


def test_relative_loads_are_over_the_rows_mean() -> None:
    loads = relative_loads([[30, 10, 20, 20], [0, 0, 0, 0]])
    assert loads[0].tolist() == [1.5, 0.5, 1.0, 1.0]
    assert np.isnan(loads[1]).all()


def test_colours_tell_idle_balanced_and_overloaded_apart() -> None:
    idle, balanced, double, more, unknown = colours(np.array([0.0, 1.0, 2.0, 9.0, np.nan])).astype(int)
    assert idle[2] > idle[0] + 50, "blue"
    assert balanced.min() > 240, "near white"
    assert double[0] > double[2] + 50, "red"
    assert (more == double).all()
    assert len({*unknown}) == 1 and unknown[0] < 240, "grey"


@pytest.mark.parametrize("shape", [(1, 2), (4, 8), (8, 16), (59, 256), (700, 1000)])
def test_every_cell_is_in_the_picture(shape: tuple[int, int]) -> None:
    rows, columns = shape
    loads = np.full(shape, 1.0)
    loads[-1, -1] = 2.0
    plain = draw_heat_map(np.full(shape, 1.0), "title", axis("layer", rows), axis("expert", columns)).astype(int)
    image = draw_heat_map(loads, "title", axis("layer", rows), axis("expert", columns))
    assert image.dtype == np.uint8 and image.ndim == 3 and max(image.shape) < 1300
    changed = np.argwhere((image != plain).any(-1))
    height, width = changed.max(0) - changed.min(0) + 1
    # One whole cell of one colour, in the lower right of the map.
    assert len(changed) == height * width
    assert (image[tuple(changed[0])] == colours(np.array(2.0))).all()


def test_a_history_keeps_every_point_in_few_columns() -> None:
    history = LoadHistory(max_columns=8)
    for point in range(1, 101):
        history.add(10 * point, {1: [point, 100 - point], 3: [1, 1]})
    columns = history._columns + history._pending
    assert len(history._columns) < 8
    assert columns[0][0] == 10
    points = history._points_per_column
    assert points == 16 and len(history._columns) == 100 // 16
    first = columns[0][1][1]
    assert first == pytest.approx([np.mean([2 * p / 100 for p in range(1, 17)]), 2 - np.mean(
        [2 * p / 100 for p in range(1, 17)])])
    assert history.draw(1, "layer 1").shape[2] == 3
