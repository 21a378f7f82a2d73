"""The file for Prometheus, read back by its own library; names of metrics always."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dsv3_megatron.metrics.tags import TAGS, find_tag
from dsv3_megatron.metrics.trackers.prometheus_file import ITERATION, KINDS, PrometheusTracker, metric_name
from dsv3_megatron.metrics.trackers.tracker_thread import TrackerThread
from tests.unit.metrics.trackers.logged_run import expected_tags, write_run


def test_each_tag_has_a_metric_of_its_own() -> None:
    names = [metric_name(tag) for tag in TAGS]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"dsv3_[a-z0-9_]+[a-z0-9]", name) for name in names)
    by_tag = {tag.name: metric_name(tag) for tag in TAGS}
    assert by_tag["lm loss"] == "dsv3_lm_loss"
    assert by_tag["grad-norm"] == "dsv3_grad_norm" and by_tag["grad-norm/{component}"] == "dsv3_grad_norm_by_component"
    assert by_tag["expert-load/layer-{layer}/max-violation"] == "dsv3_expert_load_layer_max_violation"


def test_every_tag_is_read_back_with_the_newest_value_and_no_other(tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client", reason="prometheus-client is not installed")
    from prometheus_client.parser import text_string_to_metric_families

    path = tmp_path / "node" / "dsv3.prom"
    thread = TrackerThread(PrometheusTracker(str(path), "run-7", "tiny"))
    write_run(tmp_path / "logs", [thread])
    assert (thread.num_lost, thread.num_written) == (0, 7)
    samples = [sample for family in text_string_to_metric_families(path.read_text()) for sample in family.samples]
    assert all(sample.labels["run"] == "run-7" and sample.labels["name"] == "tiny" for sample in samples)

    wanted = {}
    for written in expected_tags(*KINDS):
        tag, labels = find_tag(written)
        wanted[metric_name(tag), tuple(sorted(labels.items()))] = tag.kind
    found = {}
    for sample in samples:
        labels = {key: value for key, value in sample.labels.items() if key not in ("run", "name", "le")}
        base = re.sub("_(bucket|gsum|gcount)$", "", sample.name)
        kind = "scalar" if base == sample.name else "histogram"
        found[base, tuple(sorted(labels.items()))] = kind
    assert found.pop((ITERATION, ())) == "scalar"
    assert found == wanted

    values = {(sample.name, sample.labels.get("layer"), sample.labels.get("le")): sample.value for sample in samples}
    assert values["dsv3_lm_loss", None, None] == 8.0 / 3 and values[ITERATION, None, None] == 3
    # Four buckets of 10, 20, 30 and 40, as running sums.
    buckets = [value for (name, layer, _), value in values.items()
               if name == "dsv3_router_scores_layer_bucket" and layer == "1"]
    assert buckets == [10, 30, 60, 100, 100]


def test_a_run_that_goes_on_replaces_the_file(tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client", reason="prometheus-client is not installed")
    path = tmp_path / "dsv3.prom"
    for resumed in (0, 3):
        write_run(tmp_path / "logs", [TrackerThread(PrometheusTracker(str(path), "run-7", "tiny"))],
                  first=resumed + 1, last=resumed + 3, resumed_iteration=resumed)
    assert f'{ITERATION}{{name="tiny",run="run-7"}} 6.0' in path.read_text()
    assert [file.name for file in tmp_path.glob("*.prom*")] == ["dsv3.prom"]
