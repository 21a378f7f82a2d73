"""What lands in the event file and in metrics.jsonl; resuming; one writer only."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsv3_megatron.config.load import parse_command
from dsv3_megatron.config.presets import preset
from dsv3_megatron.metrics.flops import RunSpeed
from dsv3_megatron.metrics.run_records import StepReport, read_records
from dsv3_megatron.metrics.tags import TAGS
from dsv3_megatron.metrics.writer import MetricsWriter

Make = Callable[..., StepReport]


def read_events(directory: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events: Any = EventAccumulator(str(directory))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_round_trip(tmp_path: Path, make_report: Make, speed: RunSpeed) -> None:
    writer = MetricsWriter(tmp_path, speed, num_layers=4, log_interval=2)
    writer.write_config(preset("tiny").as_dict(), environment={"world_size": 4})
    for iteration in range(1, 6):
        writer.write_step(make_report(iteration, skipped=iteration == 3))
    writer.write_validation(5, 2.5, mtp_losses=(3.5,), num_sequences=64)
    writer.close()
    writer.close()

    records = read_records(tmp_path / "metrics.jsonl")
    assert [r["iteration"] for r in records.steps] == [1, 2, 3, 4, 5]
    assert records.column("lm_loss")[2] == (3, 8.0 / 3)  # every bit is kept
    assert [r["skipped"] for r in records.steps] == [False, False, True, False, False]
    assert records.steps[0]["layer_max_violation"] == {"1": 0.5, "4": 0.0}
    assert records.steps[0]["max_violation"] == 0.25
    assert records.validations == [
        {"kind": "validation", "iteration": 5, "lm_loss": 2.5, "mtp_losses": [3.5], "num_sequences": 64}]
    assert json.loads((tmp_path / "config.json").read_text())["model"]["num_layers"] == 4

    assert json.loads((tmp_path / "environment.json").read_text()) == {"world_size": 4}
    assert parse_command(["--config", str(tmp_path / "config.json")]).run == preset("tiny")

    events = read_events(tmp_path)
    assert [step for step, _ in events["lm loss"]] == [1, 2, 4]
    assert events["skipped-iterations"] == [(1, 0), (2, 0), (4, 1)]
    assert events["lm loss validation"] == [(5, 2.5)]
    assert events["lm loss validation ppl"][0][1] == pytest.approx(math.exp(2.5), rel=1e-6)
    assert events["mtp_1 loss validation"] == [(5, 3.5)]
    from_validation = {tag.name.replace("{depth}", "1") for tag in TAGS if tag.when == "validation"}
    assert from_validation <= set(events)


def test_each_validation_set_has_its_own_tags(tmp_path: Path, speed: RunSpeed) -> None:
    """The first stands for the validation, in the records that plots and cards read as well."""
    writer = MetricsWriter(tmp_path, speed, num_layers=4)
    writer.write_validation(5, 2.5, mtp_losses=(3.5,), sets={"code": (2.5, (3.5,)), "web": (3.0, (4.0,))})
    writer.write_average_validation(5, 2.25, sets={"code": 2.25, "web": 2.75})
    writer.close()
    assert read_events(tmp_path) == {
        "lm loss validation": [(5, 2.5)], "lm loss validation/code": [(5, 2.5)], "lm loss validation/web": [(5, 3.0)],
        "lm loss validation ppl": [(5, pytest.approx(math.exp(2.5)))],
        "lm loss validation ppl/code": [(5, pytest.approx(math.exp(2.5)))],
        "lm loss validation ppl/web": [(5, pytest.approx(math.exp(3.0)))],
        "mtp_1 loss validation": [(5, 3.5)], "mtp_1 loss validation/code": [(5, 3.5)],
        "mtp_1 loss validation/web": [(5, 4.0)], "lm loss validation average": [(5, 2.25)],
        "lm loss validation average/code": [(5, 2.25)], "lm loss validation average/web": [(5, 2.75)]}
    records = read_records(tmp_path / "metrics.jsonl")
    assert records.validation_column("lm_loss") == [(5, 2.5)]
    assert records.validations[0]["sets"] == {"code": {"lm_loss": 2.5, "mtp_losses": [3.5]},
                                              "web": {"lm_loss": 3.0, "mtp_losses": [4.0]}}


def test_resume_drops_what_is_taken_again(tmp_path: Path, make_report: Make, speed: RunSpeed) -> None:
    first = MetricsWriter(tmp_path, speed, num_layers=4)
    for iteration in range(1, 8):
        first.write_step(make_report(iteration, skipped=iteration in (2, 7)))
    first.write_validation(6, 2.0)
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind":"step","iteration":8,"lm_l')  # the crash

    time.sleep(1 - time.time() % 1)  # event files are read in the order of their names, which hold the second
    second = MetricsWriter(tmp_path, speed, num_layers=4, resumed_iteration=5)
    for iteration in range(6, 9):
        second.write_step(make_report(iteration, lm_loss=0.5))
    second.close()
    records = read_records(tmp_path / "metrics.jsonl")
    assert [r["iteration"] for r in records.steps] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [loss for _, loss in records.column("lm_loss")[5:]] == [0.5, 0.5, 0.5]
    assert records.validations == []
    events = read_events(tmp_path)
    assert [step for step, _ in events["lm loss"]] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert events["skipped-iterations"][-1] == (8, 1)


def test_new_run_in_an_old_folder_starts_anew(tmp_path: Path, make_report: Make, speed: RunSpeed) -> None:
    for _ in range(2):
        writer = MetricsWriter(tmp_path, speed, num_layers=4)
        writer.write_step(make_report(1))
        writer.close()
    assert len(read_records(tmp_path / "metrics.jsonl").steps) == 1


def test_only_the_enabled_process_writes(tmp_path: Path, make_report: Make, speed: RunSpeed) -> None:
    writer = MetricsWriter(tmp_path / "absent", speed, num_layers=4, enabled=False)
    writer.write_config({})
    writer.write_step(make_report(1))
    writer.write_validation(1, 1.0)
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_write_after_close_is_a_mistake(tmp_path: Path, make_report: Make, speed: RunSpeed) -> None:
    writer = MetricsWriter(tmp_path, speed, num_layers=4)
    writer.close()
    with pytest.raises(AssertionError, match="write after close"):
        writer.write_step(make_report(1))


def test_spikes_and_rollbacks_are_counted_where_they_happened(
        tmp_path: Path, make_report: Make, speed: RunSpeed) -> None:
    writer = MetricsWriter(tmp_path, speed, num_layers=4)
    writer.write_step(make_report(1))
    writer.write_step(make_report(2, is_spike=True, num_spikes=1, num_rollbacks=3))
    writer.close()
    records = read_records(tmp_path / "metrics.jsonl").steps
    assert [(record["spike"], record["num_rollbacks"]) for record in records] == [(False, 0), (True, 3)]
    events = read_events(tmp_path)
    assert events["spikes"] == [(1, 0), (2, 1)] and events["rollbacks"] == [(1, 0), (2, 3)]
