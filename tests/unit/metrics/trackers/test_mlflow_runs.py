"""MLflow's own files, read back by its client, where the package is installed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsv3_megatron.metrics.trackers.mlflow_runs import IDENTITY_TAG, MlflowTracker, metric_key
from dsv3_megatron.metrics.trackers.tracker_thread import TrackerThread
from tests.unit.metrics.trackers.logged_run import CONFIG, ENVIRONMENT, expected_tags, write_run


def test_no_metric_is_in_a_folder_of_another_s_name() -> None:
    keys = {metric_key(tag) for tag in expected_tags("scalar")}
    assert len(keys) == len(expected_tags("scalar"))
    assert not {key for key in keys for other in keys if key.startswith(other + "/")}
    assert {"grad-norm", "lm loss", "grpo/reward.exact", "expert-load/layer-1/entropy"} <= keys


def test_every_tag_is_read_back_and_a_run_goes_on_as_the_same_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                                 ) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    from mlflow.tracking import MlflowClient

    store = (tmp_path / "store").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    for resumed in (0, 3):
        thread = TrackerThread(MlflowTracker("dsv3", "run-7", "tiny run-7"))
        write_run(tmp_path / "logs", [thread], first=resumed + 1, last=resumed + 3, resumed_iteration=resumed)
        assert (thread.num_lost, thread.num_written) == (0, 7)

    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("dsv3")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.tags[IDENTITY_TAG] == "run-7" and run.info.status == "FINISHED"
    assert set(run.data.metrics) == {metric_key(tag) for tag in expected_tags("scalar")}
    history = [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, "lm loss")]
    assert history == [(step, 8.0 / step) for step in range(1, 7)]

    root = Path(run.info.artifact_uri.removeprefix("file://"))
    files = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    names = {tag: f"{tag}/iteration-{step:09d}.{ending}" for kind, ending in (("histogram", "json"), ("image", "png"))
             for tag in expected_tags(kind) for step in [6]}
    assert set(names.values()) <= files
    assert {name.rpartition("/")[0] for name in files if "iteration-" in name} == expected_tags("histogram", "image")
    assert {name for name in files if "iteration-" not in name} == {"config.json", "environment.json"}
    assert {name.partition("/")[0] for name in expected_tags("text")} == {"config", "environment"}
    assert json.loads((root / "config.json").read_text()) == CONFIG
    assert json.loads((root / "environment.json").read_text()) == ENVIRONMENT
    assert json.loads((root / names["router-scores/layer-1"]).read_text())["counts"] == [10, 20, 30, 40]
    assert (root / names["expert-load/now"]).read_bytes().startswith(b"\x89PNG")
