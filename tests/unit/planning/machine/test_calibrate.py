"""Micro-benchmarks as a machine, and a machine fitted to a run's logs."""

from __future__ import annotations

import dataclasses
import json

import pytest

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.presets import preset
from dsv3_megatron.planning.machine.calibrate import calibrate, measure_cpu
from dsv3_megatron.planning.machine.hardware import Figure, Hardware
from dsv3_megatron.planning.machine.hardware_tables import find_hardware
from dsv3_megatron.planning.run_cost import main_phase, only_phase
from dsv3_megatron.planning.time.step_time import step_seconds, step_time
from dsv3_megatron.planning.time.work import Setting


@pytest.fixture
def folder(tmp_path):
    """As a run on 16 H800 leaves it: six slow steps, then six that take 3 s."""
    run = preset("dsv3-16b").override(global_batch_size=256, pipeline_model_parallel_size=2)
    (tmp_path / "config.json").write_text(json.dumps(run.as_dict() | {"preset": "dsv3-16b"}))
    (tmp_path / "environment.json").write_text(json.dumps(
        {"precision": "bf16", "world_size": 16, "device": "NVIDIA H800"}))
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for iteration in range(1, 14):
            file.write(json.dumps({"kind": "step", "iteration": iteration, "batch_size": 256, "seq_length": 4096,
                                   "step_time_s": 9.0 if iteration < 4 else 3.0}) + "\n")
    return tmp_path


def test_the_fitted_machine_predicts_the_run(folder) -> None:
    result = calibrate(folder)
    assert result.step.setting.hardware.name == "h800" and result.num_steps == 10
    assert result.measured == {"step": 3.0}
    assert result.predicted["step"] == pytest.approx(result.step.seconds)
    fitted = dataclasses.replace(result.step.setting, hardware=result.fitted)
    update = result.step.update
    # Sums over ranks were not logged, and keep their prediction.
    kept = update.gradient_reduction + update.weight_gathering
    factor = 3.0 / result.step.seconds
    expected = factor * (result.step.seconds - kept) + kept
    assert step_seconds(result.step.run, fitted) == pytest.approx(expected, rel=0.01)
    assert result.fitted.figures["bf16_best_share"].source.endswith("fitted to a run")
    found = result.as_json()
    assert found["step_time_s"]["measured"] == 3.0 and found["ratio"]["step"] == pytest.approx(factor)
    assert "medians of 10 steps" in result.as_text()


def test_folders_without_a_run(folder, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"--calibrate=.*empty has no config.json; give the folder that a run had"):
        calibrate(tmp_path / "empty")
    (folder / "environment.json").write_text(json.dumps(
        {"precision": "bf16", "world_size": 16, "device": "NVIDIA L40S"}))
    with pytest.raises(ConfigError, match="device NVIDIA L40S is none of h800, .*; name the machine"):
        calibrate(folder)
    assert calibrate(folder, "a100").step.setting.hardware.name == "a100"
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match="has no step of 256 sequences of 4096 tokens, the run's longest phase"):
        calibrate(folder)


def test_micro_benchmarks_time_every_operation_of_a_run() -> None:
    from dsv3_megatron.platform import prepare

    prepare()
    from dsv3_megatron.planning.machine.micro_benchmarks import MicroBenchmarks

    base = preset("tiny").override(seq_length=32, micro_batch_size=1, global_batch_size=2, precision="fp32")
    run = only_phase(base, main_phase(base))
    benchmarks = MicroBenchmarks(run)
    benchmarks.round()
    for clock in ("wall", "cpu"):
        hardware = benchmarks.hardware(clock)
        step = step_time(run, Setting(hardware, 1))
        # Each product of the run was measured: its time is that of the micro-benchmark.
        for key, seconds in ((case.key, case.seconds[clock][0]) for case in benchmarks.cases):
            if key[0] == "product":
                _, purpose, groups, rows, columns, inner = key
                assert hardware.product_seconds("fp32", purpose, groups=groups, rows=rows, columns=columns,
                                                inner=inner) == pytest.approx(seconds)
        assert step.seconds > step.busy.products > 0 and step.busy.movement > 0 and step.busy.attention > 0
        with pytest.raises(ConfigError, match="hardware=cpu has no bf16 products; it has fp32: choose another"):
            step_time(run.override(precision="bf16"), Setting(hardware, 1))


@pytest.fixture
def quickstart(tmp_path):
    """As the quickstart leaves its logs on a CPU that is fast in bf16, which `auto` then takes."""
    run = preset("tiny").override(pipeline_model_parallel_size=2, expert_model_parallel_size=2)
    (tmp_path / "config.json").write_text(json.dumps(run.as_dict() | {"preset": "tiny"}))
    (tmp_path / "environment.json").write_text(json.dumps(
        {"precision": "bf16", "world_size": 4, "device": "Intel Xeon (AMX)"}))
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for iteration in range(1, 14):
            file.write(json.dumps({"kind": "step", "iteration": iteration, "batch_size": 8, "seq_length": 256,
                                   "step_time_s": 0.5}) + "\n")
    return tmp_path


def cpu_machine() -> Hardware:
    """A made-up CPU: fp32 alone, no communication beside compute."""
    h800 = find_hardware("h800")
    figures = {name: figure for name, figure in h800.figures.items()
               if not name.startswith(("bf16", "fp8", "context", "nccl", "fragmentation"))}
    figures |= {"is_cpu": Figure(1.0, "made up"), "fp32_flops": Figure(1e11, "made up"),
                "fp32_best_share": Figure(1.0, "made up")}
    return dataclasses.replace(h800, name="cpu", figures=figures, products=())


def test_a_run_in_bf16_on_a_cpu_is_calibrated(quickstart, monkeypatch) -> None:
    asked = []

    def measured(run, num_processes):
        asked.append((run.training.precision, num_processes))
        return cpu_machine()

    monkeypatch.setattr("dsv3_megatron.planning.machine.calibrate.measure_cpu", measured)
    result = calibrate(quickstart)
    assert asked == [("fp32", 4)] and result.measured == {"step": 0.5}
    fitted = dataclasses.replace(result.step.setting, hardware=result.fitted)
    assert step_seconds(result.step.run, fitted) == pytest.approx(0.5, rel=0.05)
    assert "medians of 10 steps" in result.as_text()


@pytest.mark.parametrize("settings", [{"precision": "bf16"}, {"fp8": "blockwise"}])
def test_products_that_a_cpu_is_not_measured_in_are_refused_at_once(settings) -> None:
    run = preset("tiny").override(**settings)
    with pytest.raises(ConfigError, match="on a CPU products are measured in fp32 alone; plan with --precision fp32"):
        measure_cpu(only_phase(run, main_phase(run)), 1)
