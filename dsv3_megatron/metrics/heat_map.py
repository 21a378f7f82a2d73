"""Heat maps as images: a load relative to its mean, by colour, with labelled axes.

Drawn with Pillow, in milliseconds, because a run draws them as it trains; matplotlib takes a fifth of a second.

Shapes: y rows of a picture, x columns of a picture. Images are uint8 [height, width, 3].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Blue: idle; near white: its share; red: twice its share and more. Apart for every kind of colour vision.
_COLOURS = ((0.0, (5, 48, 97)), (0.5, (103, 169, 207)), (1.0, (247, 247, 247)), (1.5, (239, 138, 98)),
            (2.0, (103, 0, 31)))
_UNKNOWN = (200, 200, 200)
_INK = (31, 41, 55)
_WIDTH, _HEIGHT = 640, 320
_LARGEST_CELL = 28
_LINE = 15


@dataclass(frozen=True)
class Axis:
    """One axis of a heat map: its name and a label for each of its cells."""

    name: str
    labels: Sequence[str]


def relative_loads(counts_yx: Sequence[Sequence[float]]) -> np.ndarray:
    """Each row over its own mean, fp64 [y, x]: 1 is a cell's share; NaN where a row is all zeros."""
    counts = np.asarray(counts_yx, dtype=np.float64)
    means = counts.mean(axis=1, keepdims=True)
    return np.divide(counts, means, out=np.full_like(counts, np.nan), where=means > 0)


def draw_heat_map(loads_yx: np.ndarray, title: str, rows: Axis, columns: Axis) -> np.ndarray:
    """An image of relative loads, 0 to 2 and more; what is not known is grey.

    Args:
        loads_yx: Loads as `relative_loads` gives them; NaN where not known.
        title: Line of text above the picture.
        rows: The axis from top to bottom.
        columns: The axis from left to right.

    Returns:
        uint8 [height, width, 3].
    """
    cell_height = _cell_size(_HEIGHT, loads_yx.shape[0])
    cell_width = _cell_size(_WIDTH, loads_yx.shape[1])
    pixels = np.repeat(np.repeat(colours(loads_yx), cell_height, axis=0), cell_width, axis=1)
    height, width = pixels.shape[:2]
    font = ImageFont.load_default(size=12)
    left = 12 + int(max(font.getlength(text) for text in (*rows.labels, rows.name)))
    top, bar = 2 * _LINE + 12, 16
    bar_height = max(height, 4 * _LINE)
    image = Image.new("RGB", (max(left + width + 20 + bar + 40, left + int(font.getlength(title)) + 8),
                              top + bar_height + 2 * _LINE + 8), "white")
    image.paste(Image.fromarray(pixels), (left, top))
    draw = ImageDraw.Draw(image)
    draw.text((left, 3), title, _INK, font)
    draw.text((left - 6, top - 8), rows.name, _INK, font, anchor="rs")
    for index in _spaced(len(rows.labels), cell_height, _LINE):
        draw.text((left - 6, top + (index + 0.5) * cell_height), rows.labels[index], _INK, font, anchor="rm")
    widest = max(font.getlength(text) for text in columns.labels) + 10
    for index in _spaced(len(columns.labels), cell_width, widest):
        draw.text((left + (index + 0.5) * cell_width, top + height + 4), columns.labels[index], _INK, font, anchor="mt")
    draw.text((left + width / 2, top + height + 5 + _LINE), columns.name, _INK, font, anchor="mt")
    _draw_scale(image, draw, font, (left + width + 20, top, bar, bar_height))
    return np.asarray(image)


def colours(loads: np.ndarray) -> np.ndarray:
    """Relative loads as colours, uint8 [..., 3]."""
    stops = [stop for stop, _ in _COLOURS]
    clipped = np.clip(np.nan_to_num(loads, nan=1.0), 0.0, 2.0)
    channels = [np.interp(clipped, stops, [colour[channel] for _, colour in _COLOURS]) for channel in range(3)]
    found = np.stack(channels, axis=-1).round().astype(np.uint8)
    found[np.isnan(loads)] = _UNKNOWN
    return found


def _cell_size(available: int, num_cells: int) -> int:
    return max(1, min(_LARGEST_CELL, available // num_cells))


def _spaced(num_cells: int, cell_size: int, label_size: float) -> Iterator[int]:
    """Cells to label so that labels do not touch."""
    yield from range(0, num_cells, max(1, -int(-label_size // cell_size)))


def _draw_scale(image: Image.Image, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
                box: tuple[int, int, int, int]) -> None:
    """The colours and what they mean, beside the map."""
    left, top, width, height = box
    scale = colours(np.linspace(2.0, 0.0, height))[:, None].repeat(width, axis=1)
    image.paste(Image.fromarray(scale), (left, top))
    for load, text in ((2.0, "2+"), (1.0, "1"), (0.0, "0")):
        place = top + (2.0 - load) / 2.0 * (height - 1)
        draw.text((left + width + 5, place), text, _INK, font, anchor="lm")


class LoadHistory:
    """Relative loads of every layer's experts over the run, in a bounded number of columns.

    When the columns are used up, neighbours are averaged into one and each new column holds twice as many points.
    It begins with the process: a resumed run begins anew.

    Args:
        max_columns: Largest number of columns, even.
    """

    def __init__(self, max_columns: int = 256) -> None:
        assert max_columns % 2 == 0
        self._max_columns = max_columns
        self._points_per_column = 1
        self._columns: list[tuple[int, dict[int, np.ndarray]]] = []
        self._pending: list[tuple[int, dict[int, np.ndarray]]] = []

    def add(self, iteration: int, counts: dict[int, list[int]]) -> None:
        """One point: expert loads by layer after `iteration` steps."""
        self._pending.append((iteration, {layer: relative_loads([loads])[0] for layer, loads in counts.items()}))
        if len(self._pending) == self._points_per_column:
            self._columns.append(_mean_column(self._pending))
            self._pending = []
        if len(self._columns) == self._max_columns:
            self._columns = [_mean_column(self._columns[i:i + 2]) for i in range(0, self._max_columns, 2)]
            self._points_per_column *= 2

    def draw(self, layer: int, title: str) -> np.ndarray:
        """An image of a layer's experts, from the first one at the top, over the run's steps."""
        columns = self._columns + ([_mean_column(self._pending)] if self._pending else [])
        loads = np.stack([loads[layer] for _, loads in columns if layer in loads], axis=1)
        return draw_heat_map(loads, title, Axis("expert", [str(expert) for expert in range(len(loads))]),
                             Axis("iteration", [str(iteration) for iteration, found in columns if layer in found]))


def _mean_column(columns: Sequence[tuple[int, dict[int, np.ndarray]]]) -> tuple[int, dict[int, np.ndarray]]:
    """Columns as one, under the first one's iteration; layers of all of them."""
    layers = set.intersection(*(set(loads) for _, loads in columns))
    return columns[0][0], {layer: np.mean([loads[layer] for _, loads in columns], axis=0) for layer in layers}
