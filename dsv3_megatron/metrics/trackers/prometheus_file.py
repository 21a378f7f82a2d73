"""Prometheus: the newest value of each tag in a file that node exporter's textfile collector reads.

No port is opened, so that a cluster's own exporter, which is there already, decides who may read. A tag's name becomes
a metric's: `expert-load/layer-{layer}/max-violation` is dsv3_expert_load_layer_max_violation{layer="3"}. Images and
texts have no place in Prometheus.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsv3_megatron.metrics.tags import Tag, find_tag
from dsv3_megatron.metrics.trackers.tracked_values import TagHistogram, TrackedValues

ITERATION = "dsv3_iteration"
KINDS = ("scalar", "histogram")


class PrometheusTracker:
    """A file with the newest values of a run.

    Args:
        path: The file, which must end in .prom for the collector; replaced as a whole each time.
        run_id: Identity of the run, the label `run` of every value.
        run_name: Name that people see, the label `name` of every value.
    """

    name = "prometheus"

    def __init__(self, path: str, run_id: str, run_name: str) -> None:
        self._path = Path(path)
        self._labels = {"run": run_id, "name": run_name}
        self._step = 0
        self._scalars: dict[str, float] = {}
        self._histograms: dict[str, TagHistogram] = {}

    def open(self) -> None:
        """Make the folder and the registry."""
        from prometheus_client import CollectorRegistry

        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def write(self, values: TrackedValues) -> None:
        """Replace the file by one with these values, and the newest of the tags that are not among them."""
        from prometheus_client import write_to_textfile

        self._step = values.step
        self._scalars |= values.scalars
        self._histograms |= values.histograms
        write_to_textfile(str(self._path), self._registry)

    def close(self) -> None:
        """Leave the file as it is: its time of change says that nothing follows."""

    def collect(self) -> Iterator[Any]:
        """Give the registry the newest values, tag by tag."""
        from prometheus_client.core import GaugeHistogramMetricFamily, GaugeMetricFamily

        names = list(self._labels)
        steps = GaugeMetricFamily(ITERATION, "optimizer steps taken", labels=names)
        steps.add_metric(list(self._labels.values()), self._step)
        yield steps
        for tag, found in _by_tag([*self._scalars, *self._histograms]):
            more = list(found[0][1])
            if tag.kind == "scalar":
                gauge = GaugeMetricFamily(metric_name(tag), _help(tag), labels=names + more)
                for written, labels in found:
                    gauge.add_metric([*self._labels.values(), *labels.values()], self._scalars[written])
                yield gauge
            else:
                family = GaugeHistogramMetricFamily(metric_name(tag), _help(tag), labels=names + more)
                for written, labels in found:
                    histogram = self._histograms[written]
                    sums = itertools.accumulate(histogram.counts)
                    buckets = [(repr(float(edge)), total)
                               for edge, total in zip(histogram.edges[1:], sums, strict=True)]
                    family.add_metric([*self._labels.values(), *labels.values()],
                                      [*buckets, ("+Inf", sum(histogram.counts))], histogram.total)
                yield family


def metric_name(tag: Tag) -> str:
    """Name of the metric that a tag becomes; what stands in braces becomes labels."""
    name = re.sub(r"/\{(\w+)\}$", r"_by_\1", tag.name)
    name = re.sub(r"\{\w+\}", "", name)
    return "dsv3_" + re.sub(r"[^a-zA-Z0-9]+", "_", name).strip("_")


def _help(tag: Tag) -> str:
    return f"{tag.meaning} ({tag.unit})" if tag.unit else tag.meaning


def _by_tag(written: list[str]) -> Iterator[tuple[Tag, list[tuple[str, dict[str, str]]]]]:
    """Each tag of the table with the names under which it was written, and their labels."""
    found: dict[str, tuple[Tag, list[tuple[str, dict[str, str]]]]] = {}
    for name in written:
        tag, labels = find_tag(name)
        found.setdefault(tag.name, (tag, []))[1].append((name, labels))
    yield from found.values()
