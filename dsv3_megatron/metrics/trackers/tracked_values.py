"""What a run gives to its trackers: values by tag, of one logged moment. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np

# Of a scalar with its tag, for the bound on what is kept.
_SCALAR_BYTES = 200


@dataclass(frozen=True)
class TagHistogram:
    """Counts of values between edges.

    Attributes:
        edges: Ends of the buckets in ascending order, one more than there are buckets.
        counts: Values in each bucket.
    """

    edges: Sequence[float]
    counts: Sequence[int]

    @property
    def total(self) -> float:
        """Sum of the values, each taken as the middle of its bucket."""
        return sum(count * middle for count, middle in zip(self.counts, self._middles(), strict=True))

    @property
    def sum_squares(self) -> float:
        """Sum of the values' squares, each taken as the middle of its bucket."""
        return sum(count * middle**2 for count, middle in zip(self.counts, self._middles(), strict=True))

    def _middles(self) -> list[float]:
        return [(low + high) / 2 for low, high in zip(self.edges, self.edges[1:], strict=False)]


@dataclass
class TrackedValues:
    """What a run logs at one moment, by tag.

    Attributes:
        step: Optimizer steps taken.
        scalars: Numbers by tag.
        histograms: Histograms by tag.
        images_HWC: Images by tag, uint8 [height, width, channels].
        documents: Plain nested values by name, such as the configuration.
    """

    step: int
    scalars: dict[str, float] = field(default_factory=dict)
    histograms: dict[str, TagHistogram] = field(default_factory=dict)
    images_HWC: dict[str, np.ndarray] = field(default_factory=dict)
    documents: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Size in memory, about."""
        numbers = len(self.scalars) + sum(len(one.counts) for one in self.histograms.values())
        return _SCALAR_BYTES * numbers + sum(image.nbytes for image in self.images_HWC.values())


class Tracker(Protocol):
    """A program that keeps what runs log. Any of these calls may raise, and may take long.

    Attributes:
        name: Name for messages.
    """

    name: str

    def open(self) -> None:
        """Begin the run there, or go on with it."""

    def write(self, values: TrackedValues) -> None:
        """Hand over what was logged at one moment."""

    def close(self) -> None:
        """Say that the run has ended."""
