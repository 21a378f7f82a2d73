"""MLflow: scalars are a run's metrics, everything else its artifacts. Where the server is, MLFLOW_TRACKING_URI says.

A run that goes on is found by its identity, which stands in one of MLflow's tags. Where MLflow keeps files, a slash in
a metric's name makes a folder, and `grad-norm` cannot be a file beside the folder `grad-norm/`: there a dot takes the
place of the slash, wherever the files are.
"""

from __future__ import annotations

import time
from typing import Any

from dsv3_megatron.metrics.tags import find_tag
from dsv3_megatron.metrics.trackers.tracked_values import TrackedValues

IDENTITY_TAG = "dsv3.run"
# Metrics that a server takes in one call.
_BATCH = 1000


class MlflowTracker:
    """A run of an MLflow experiment.

    Args:
        experiment: Name of the experiment; made if it is not there.
        run_id: Identity of the run, of this library.
        run_name: Name that people see.
    """

    name = "mlflow"

    def __init__(self, experiment: str, run_id: str, run_name: str) -> None:
        self._experiment, self._identity, self._run_name = experiment, run_id, run_name
        self._client: Any = None
        self._run_id = ""

    def open(self) -> None:
        """Begin the run there, or go on with it."""
        from mlflow.tracking import MlflowClient

        client = MlflowClient()
        experiment = client.get_experiment_by_name(self._experiment)
        experiment_id = experiment.experiment_id if experiment else client.create_experiment(self._experiment)
        known = client.search_runs([experiment_id], f"tags.`{IDENTITY_TAG}` = '{self._identity}'", max_results=1)
        if known:
            self._run_id = known[0].info.run_id
            client.update_run(self._run_id, status="RUNNING")
        else:
            run = client.create_run(experiment_id, tags={IDENTITY_TAG: self._identity}, run_name=self._run_name)
            self._run_id = run.info.run_id
        self._client = client

    def write(self, values: TrackedValues) -> None:
        """Hand over what was logged at one moment."""
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        metrics = [Metric(metric_key(tag), float(value), now_ms, values.step) for tag, value in values.scalars.items()]
        for first in range(0, len(metrics), _BATCH):
            self._client.log_batch(self._run_id, metrics=metrics[first:first + _BATCH])
        for name, document in values.documents.items():
            self._client.log_dict(self._run_id, dict(document), f"{name}.json")
        for tag, histogram in values.histograms.items():
            self._client.log_dict(self._run_id, {"edges": list(histogram.edges), "counts": list(histogram.counts)},
                                  _artifact(tag, values.step, "json"))
        for tag, image_HWC in values.images_HWC.items():
            self._client.log_image(self._run_id, image_HWC, artifact_file=_artifact(tag, values.step, "png"))

    def close(self) -> None:
        """Say that the run has ended."""
        self._client.set_terminated(self._run_id)


def metric_key(tag: str) -> str:
    """Name of the metric that a written tag becomes: its own, but for a dot behind a name that is a tag too."""
    front, _, last = tag.rpartition("/")
    try:
        find_tag(front)
    except KeyError:
        return tag
    return f"{front}.{last}"


def _artifact(tag: str, step: int, ending: str) -> str:
    return f"{tag}/iteration-{step:09d}.{ending}"
