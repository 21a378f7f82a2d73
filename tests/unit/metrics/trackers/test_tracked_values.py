"""Sums of a histogram by hand, and sizes."""

from __future__ import annotations

import numpy as np

from dsv3_megatron.metrics.trackers.tracked_values import TagHistogram, TrackedValues


def test_sums_are_those_of_the_middles_of_buckets() -> None:
    histogram = TagHistogram([0.0, 1.0, 3.0], [2, 3])
    assert histogram.total == 2 * 0.5 + 3 * 2.0
    assert histogram.sum_squares == 2 * 0.25 + 3 * 4.0


def test_images_count_with_their_bytes() -> None:
    values = TrackedValues(1, scalars={"a": 1.0})
    small = values.num_bytes
    values.images_HWC["map"] = np.zeros((10, 20, 3), np.uint8)
    assert small > 0 and values.num_bytes == small + 600
