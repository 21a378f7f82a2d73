"""Places that the values of a run go to: TensorBoard's event file and the trackers, all by the same tags.

TensorBoard gets each value as it comes; a tracker gets those of a moment together, when they are flushed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dsv3_megatron.config.output import json_text
from dsv3_megatron.metrics.event_writer import EventWriter
from dsv3_megatron.metrics.trackers.tracked_values import TagHistogram, TrackedValues
from dsv3_megatron.metrics.trackers.tracker_thread import TrackerThread


class MetricSinks:
    """All places that a run's values go to.

    Args:
        events: TensorBoard's event file.
        trackers: Trackers, which get the same.
    """

    def __init__(self, events: EventWriter, trackers: Sequence[TrackerThread] = ()) -> None:
        self._events, self._trackers = events, trackers
        self._values: TrackedValues | None = None

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Write one number of a tag at a step."""
        self._events.add_scalar(tag, value, step)
        self._at(step).scalars[tag] = float(value)

    def add_document(self, name: str, values: Mapping[str, Any]) -> None:
        """Write plain nested values, such as the configuration, at step 0."""
        self._events.add_text(name, "```json\n" + json_text(values, indent=2) + "\n```", 0)
        self._at(0).documents[name] = values

    def add_image(self, tag: str, image_HWC: np.ndarray, step: int) -> None:
        """Write an image, uint8 [height, width, channels]."""
        self._events.add_image(tag, image_HWC, step)
        self._at(step).images_HWC[tag] = image_HWC

    def add_histogram(self, tag: str, histogram: TagHistogram, step: int) -> None:
        """Write a histogram of values that were counted elsewhere."""
        self._events.add_histogram(tag, histogram, step)
        self._at(step).histograms[tag] = histogram

    def flush(self) -> None:
        """Write what can be written now, and hand the moment to the trackers."""
        self._events.flush()
        values, self._values = self._values, None
        if values is not None:
            for tracker in self._trackers:
                tracker.put(values)

    def close(self) -> None:
        """Write what is left and let everything go; may be called twice."""
        self.flush()
        self._events.close()
        for tracker in self._trackers:
            tracker.close()

    def _at(self, step: int) -> TrackedValues:
        if self._values is None:
            self._values = TrackedValues(step)
        assert self._values.step == step, "each moment is flushed before the next"
        return self._values
