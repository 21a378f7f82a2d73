"""Decides whether a step's loss or gradient norm is out of line with the steps before it. Pure Python.

A value is a spike if it exceeds

    median + max(threshold * 1.4826 * MAD, floor)

over a window of past good steps, where MAD is the median absolute deviation and 1.4826 * MAD estimates the standard
deviation of a normal distribution, whatever a few outliers do. Only values above the median are spikes. The floor
keeps a nearly constant window from firing at nothing. The gradient norm is judged by its logarithm: it varies by
factors, and over a run by orders of magnitude. A spike does not enter the window it was judged by; but as many in a
row as a window needs are no spike, they are the new level, and become the window.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from dsv3_megatron.config.guards import GuardConfig

# Standard deviations of a normal distribution in one MAD of it.
_SCALE_OF_MAD = 1.4826
# Stands in for a gradient norm of 0, which has no logarithm.
_SMALLEST_NORM = 1e-30
LOSS, GRAD_NORM = "lm loss", "grad norm"


@dataclass(frozen=True)
class Spike:
    """A value that is out of line with the window.

    Attributes:
        name: LOSS or GRAD_NORM.
        value: The value itself.
        limit: Largest value that would have been no spike.
        median: Median of the window.
        num_steps: Steps in the window.
    """

    name: str
    value: float
    limit: float
    median: float
    num_steps: int

    def __str__(self) -> str:
        return (f"{self.name} {self.value:.4g} exceeds {self.limit:.4g} (median {self.median:.4g} of the last "
                f"{self.num_steps} good steps)")


def upper_limit(values: Sequence[float], *, threshold: float, floor: float) -> tuple[float, float]:
    """The largest value that is no spike after `values`, and their median.

    Args:
        values: Values of past good steps, at least one.
        threshold: Distance of the limit from the median, in robust standard deviations.
        floor: Smallest distance of the limit from the median.
    """
    center = median(values)
    deviation = median(abs(value - center) for value in values)
    return center + max(threshold * _SCALE_OF_MAD * deviation, floor), center


class SpikeDetector:
    """Judges loss and gradient norm of each step by a window of those before it.

    Args:
        config: Window, thresholds and floors.
    """

    def __init__(self, config: GuardConfig) -> None:
        self._config = config
        self._window: deque[tuple[float, float]] = deque(maxlen=config.spike_window)
        self._flagged: list[tuple[float, float]] = []

    @property
    def window(self) -> list[tuple[float, float]]:
        """Loss and gradient norm of the last good steps, oldest first."""
        return list(self._window)

    def judge(self, loss: float, grad_norm: float) -> tuple[Spike, ...]:
        """What is out of line with the window, which stays as it is. Both values are finite.

        Before spike_min_steps good steps, nothing is.
        """
        config, found = self._config, []
        if len(self._window) < config.spike_min_steps:
            return ()
        if config.spike_loss_threshold:
            limit, center = upper_limit([entry[0] for entry in self._window], threshold=config.spike_loss_threshold,
                                        floor=config.spike_loss_floor)
            if loss > limit:
                found.append(Spike(LOSS, loss, limit, center, len(self._window)))
        if config.spike_grad_norm_threshold:
            limit, center = upper_limit([_logarithm(entry[1]) for entry in self._window],
                                        threshold=config.spike_grad_norm_threshold,
                                        floor=math.log(config.spike_grad_norm_floor))
            if _logarithm(grad_norm) > limit:
                found.append(Spike(GRAD_NORM, grad_norm, math.exp(limit), math.exp(center), len(self._window)))
        return tuple(found)

    def record(self, loss: float, grad_norm: float, *, is_spike: bool) -> bool:
        """Take in a step, after all ranks agreed on whether it is a spike.

        Returns:
            Whether the last spike_min_steps steps, all of them spikes, have become the window.
        """
        if not is_spike:
            self._window.append((loss, grad_norm))
            self._flagged.clear()
            return False
        self._flagged.append((loss, grad_norm))
        if len(self._flagged) < self._config.spike_min_steps:
            return False
        self._window.clear()
        self._window.extend(self._flagged)
        self._flagged.clear()
        return True

    def state_dict(self) -> dict[str, Any]:
        """Window and spikes in a row, as plain JSON values that keep every bit."""
        return {"window": [list(entry) for entry in self._window], "flagged": [list(entry) for entry in self._flagged]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; of a larger window, with its last steps."""
        self._window = deque(((loss, norm) for loss, norm in state["window"]), maxlen=self._config.spike_window)
        self._flagged = [(loss, norm) for loss, norm in state["flagged"]]


def _logarithm(grad_norm: float) -> float:
    return math.log(max(grad_norm, _SMALLEST_NORM))
