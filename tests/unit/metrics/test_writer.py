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
from dsv3_megatron.metrics.run_records import RunRecords, StepReport, read_records, to_line, truncate_records
from dsv3_megatron.metrics.scalars import step_scalars
from dsv3_megatron.metrics.tags import TAGS
from dsv3_megatron.metrics.writer import MetricsWriter

Make = Callable[..., StepReport]


def read_events(directory: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events: Any = EventAccumulator(str(directory))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_scalars_have_megatron_names(make_report: Make, speed: RunSpeed) -> None:
    scalars = step_scalars(make_report(2), speed)
    tokens_per_second = 16 * 256 / 0.5
    flops = speed.flops.training * tokens_per_second
    entropy = -sum(share * math.log(share, 4) for share in (3 / 8, 1 / 8, 1 / 4, 1 / 4))
    assert scalars == {
        "lm loss": 4.0, "mtp_1 loss": 4.5, "seq_load_balancing_loss": 1.5, "grad-norm": 0.25, "learning-rate": 1e-3,
        "batch-size": 16, "iteration-time": 0.5, "throughput": flops / 4 / 1e12,
        "tokens-per-second": tokens_per_second, "model-flops-per-second": flops, "mfu": flops / 4 / 1e9,
        "consumed-tokens": 8192, "consumed-samples": 32,
        "expert-load/layer-1/max-violation": 0.5, "expert-load/layer-1/least-load": 0.5,
        "expert-load/layer-1/entropy": pytest.approx(entropy), "expert-load/layer-1/dead-experts": 0.0,
        "expert-load/layer-4/max-violation": 0.0, "expert-load/layer-4/least-load": 1.0,
        "expert-load/layer-4/entropy": pytest.approx(1.0), "expert-load/layer-4/dead-experts": 0.0,
        "router-bias/layer-1/direction": 0.0, "router-bias/layer-4/direction": 0.0, "router-bias/direction": 0.0,
        "expert-load/max-violation": 0.25, "expert-load/least-load": 0.75, "expert-load/dead-experts": 0.0,
        "expert-load/entropy": pytest.approx((1 + entropy) / 2),
    }


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


def test_diverged_values_are_strict_json() -> None:
    line = to_line({"kind": "step", "iteration": 1, "lm_loss": math.nan, "mtp_losses": (1.0, math.inf)})
    assert json.loads(line, parse_constant=pytest.fail) == {
        "kind": "step", "iteration": 1, "lm_loss": None, "mtp_losses": [1.0, None],
        "nonfinite": ["lm_loss", "mtp_losses.1"]}


def test_reading_names_the_broken_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    good = '{"kind":"step","iteration":1,"lm_loss":2.0}\n'
    path.write_text(good + "not json\n" + good)
    with pytest.raises(ValueError, match=rf"metrics\.jsonl:2 \(byte {len(good)}\) is not a metrics record"):
        read_records(path)
    path.write_text('{"kind":"step"}\n')
    with pytest.raises(ValueError, match=r":1 \(byte 0\) is not a metrics record: 'iteration'"):
        read_records(path)
    path.write_text(good + '{"kind":')
    assert len(read_records(path).steps) == 1


def test_truncating_counts_what_it_drops(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert truncate_records(path, 3) == (RunRecords([], []), 0)
    path.write_text("".join(f'{{"kind":"step","iteration":{i}}}\n' for i in range(1, 6)) + '{"ki')
    kept, num_dropped = truncate_records(path, 3)
    assert ([r["iteration"] for r in kept.steps], num_dropped) == ([1, 2, 3], 3)
    assert path.read_text().count("\n") == 3
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


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
