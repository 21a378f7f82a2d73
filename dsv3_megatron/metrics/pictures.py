"""Heat maps and histograms of a run in TensorBoard and the trackers.

What each tag means stands in `tags.py`, and from there in the README of this folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dsv3_megatron.metrics.heat_map import Axis, LoadHistory, draw_heat_map, relative_loads
from dsv3_megatron.metrics.run_records import StepReport
from dsv3_megatron.metrics.sinks import MetricSinks
from dsv3_megatron.metrics.trackers.tracked_values import TagHistogram

_NUM_BIAS_BINS = 30


class Pictures:
    """Heat maps and histograms of a run.

    Args:
        sinks: Places they go to.
        num_layers: Transformer layers of the main model; a layer from there on is an MTP module.
    """

    def __init__(self, sinks: MetricSinks, num_layers: int) -> None:
        self._sinks = sinks
        self._num_layers = num_layers
        self._history = LoadHistory()

    def note(self, report: StepReport) -> None:
        """Remember a logged step for the heat maps over time."""
        if report.expert_load:
            self._history.add(report.iteration, dict(report.expert_load))

    def write(self, report: StepReport) -> None:
        """Draw the step's heat maps and histograms, and the run's heat maps up to it."""
        load, step = report.expert_load, report.iteration
        if load:
            self._write_map("expert-load/now", f"expert load over its mean, iteration {step}", load, "expert", step)
        for layer in load:
            image = self._history.draw(layer, f"{self._name(layer)}: expert load over its mean")
            self._sinks.add_image(f"expert-load/layer-{layer}/over-time", image, step)
        routers = report.measurements.routers if report.measurements else {}
        groups = {layer: router.tokens_per_group for layer, router in routers.items()
                  if len(router.tokens_per_group) > 1}
        if groups:
            self._write_map("expert-groups/now", f"tokens per group over their mean, iteration {step}", groups, "group",
                            step)
        for layer, router in routers.items():
            edges = np.linspace(0.0, 1.0, len(router.score_counts) + 1)
            self._write_histogram(f"router-scores/layer-{layer}", np.asarray(router.score_counts), edges, step)
            self._write_histogram(f"router-bias/layer-{layer}/histogram", *np.histogram(router.bias, _NUM_BIAS_BINS),
                                  step)

    def _write_map(self, tag: str, title: str, counts: Mapping[int, Sequence[int]], column_name: str, step: int
                   ) -> None:
        loads = relative_loads(list(counts.values()))
        image = draw_heat_map(loads, title, Axis("layer", [self._name(layer, short=True) for layer in counts]),
                              Axis(column_name, [str(column) for column in range(loads.shape[1])]))
        self._sinks.add_image(tag, image, step)

    def _write_histogram(self, tag: str, counts: np.ndarray, edges: np.ndarray, step: int) -> None:
        self._sinks.add_histogram(tag, TagHistogram(edges.tolist(), counts.tolist()), step)

    def _name(self, layer: int, short: bool = False) -> str:
        if layer >= self._num_layers:
            return f"MTP {layer - self._num_layers + 1}"
        return str(layer) if short else f"layer {layer}"
