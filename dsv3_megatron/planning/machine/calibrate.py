"""What this machine really does: micro-benchmarks of a CPU, and rates fitted to a run's own logs.

The step time is linear in the times of kernels, so three factors make a machine agree with a run: one for all that goes
on in forward and backward passes, one for the sum of gradients over ranks, one for the optimizer. They are the ratios
of measured to predicted time; other layouts and models are then planned with the fitted machine.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.json_files import read_json
from dsv3_megatron.config.load import parse_command
from dsv3_megatron.config.output import json_text
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.metrics.run_records import CONFIG_FILE, ENVIRONMENT_FILE, METRICS_FILE, read_records
from dsv3_megatron.planning.machine.hardware import AttentionPoint, Figure, Hardware, load_hardware
from dsv3_megatron.planning.machine.hardware_tables import HARDWARE, find_hardware
from dsv3_megatron.planning.run_cost import main_phase, only_phase
from dsv3_megatron.planning.time.step_time import StepTime, step_time
from dsv3_megatron.planning.time.work import Setting
from dsv3_megatron.process.loopback import LOOPBACK, free_port
from dsv3_megatron.process.parent import environment_of_child

_ROUNDS = 5
# Steps at the beginning of a run that are not typical, unless there are no others.
_WARM_UP_STEPS = 3
_PASSES, _REDUCTION, _OPTIMIZER = "forward-backward", "gradient-reduction", "optimizer"


@dataclass(frozen=True)
class Calibration:
    """A run beside its prediction.

    Attributes:
        step: Predicted step, before fitting.
        measured: Median seconds of the step, and of its parts as far as the run has logged them.
        predicted: Predicted seconds of the same parts.
        fitted: The machine with which prediction and measurement agree.
        num_steps: Steps that the medians are of.
    """

    step: StepTime
    measured: dict[str, float]
    predicted: dict[str, float]
    fitted: Hardware
    num_steps: int

    def as_json(self) -> dict[str, Any]:
        """Give the calibration as plain values, ready for JSON; times in seconds."""
        return {"step_time_s": {"measured": self.measured["step"], "predicted": self.predicted["step"]},
                "measured": self.measured, "predicted": self.predicted, "num_steps": self.num_steps,
                "ratio": {name: self.measured[name] / seconds for name, seconds in self.predicted.items()
                          if name in self.measured and seconds},
                "hardware": self.step.setting.hardware.name}

    def as_text(self) -> str:
        """Write the calibration as lines for a terminal."""
        lines = [f"{self.step.run.name}, {self.step.setting.num_devices} x {self.step.setting.hardware.name}, "
                 f"medians of {self.num_steps} steps",
                 f"  {'':20} {'measured':>10} {'predicted':>10} {'ratio':>7}"]
        for name, measured in self.measured.items():
            predicted = self.predicted.get(name)
            shown = f"{predicted:10.4f} {measured / predicted:7.3f}" if predicted else f"{'-':>10}"
            lines.append(f"  {name:20} {measured:10.4f} {shown}")
        return "\n".join(lines)


def calibrate(folder: Path, hardware_name: str | None = None) -> Calibration:
    """Compare a run with its prediction, and fit the machine.

    Args:
        folder: The run's --tensorboard-dir.
        hardware_name: The machine it ran on; None: by its device's name, for a CPU this machine, measured now.

    Raises:
        ConfigError: there is no run in the folder, or its device is not known.
    """
    for name in (CONFIG_FILE, ENVIRONMENT_FILE, METRICS_FILE):
        if not (folder / name).is_file():
            raise ConfigError(f"--calibrate={folder} has no {name}; give the folder that a run had as "
                              "--tensorboard-dir")
    environment = read_json(folder / ENVIRONMENT_FILE)
    run = parse_command(["--config", str(folder / CONFIG_FILE)]).run
    run = run.override(precision=environment["precision"])
    num_devices = int(environment["world_size"])
    one = only_phase(run, main_phase(run))
    measured, num_steps = _measured(folder, one)
    hardware = _machine(hardware_name, str(environment["device"]), one, num_devices)
    if hardware.is_cpu:  # a CPU's products are measured in fp32: what bf16 makes of them is in the fitted factors
        one = one.override(precision="fp32")
    setting = Setting(hardware, num_devices)
    step = step_time(one, setting)
    predicted = {"step": step.seconds, _PASSES: step.pipeline, _REDUCTION: step.update.gradient_reduction,
                 _OPTIMIZER: step.update.optimizer + step.update.weight_gathering}
    return Calibration(step, measured, predicted, fit(hardware, measured, predicted), num_steps)


def _measured(folder: Path, run: RunConfig) -> tuple[dict[str, float], int]:
    """Medians over the typical steps of the run's batch and sequence length."""
    records = read_records(folder / METRICS_FILE)
    steps = [step for step in records.steps if step.get("batch_size") == run.training.global_batch_size
             and step.get("seq_length") in (None, run.training.seq_length)]
    if not steps:
        raise ConfigError(f"--calibrate={folder} has no step of {run.training.global_batch_size} sequences of "
                          f"{run.training.seq_length} tokens, the run's longest phase; let it run longer")
    typical = steps[_WARM_UP_STEPS:] or steps
    found = {"step": statistics.median(step["step_time_s"] for step in typical)}
    found |= _logged_parts(folder, {step["iteration"] for step in typical})
    return found, len(typical)


def _logged_parts(folder: Path, iterations: set[int]) -> dict[str, float]:
    """Median seconds of the passes, the reduction and the optimizer, of the logged steps; empty if there are none."""
    if not any(folder.glob("events.out.tfevents.*")):
        return {}
    from dsv3_megatron.metrics.event_files import read_run

    scalars = read_run(folder).scalars
    parts = {}
    for name in (_PASSES, _REDUCTION, _OPTIMIZER):
        values = [value for step, value in scalars.get(f"time/{name}", []) if step in iterations]
        if values:
            parts[name] = statistics.median(values)
    return parts


def _machine(name: str | None, device: str, run: RunConfig, num_devices: int) -> Hardware:
    if name is not None and name != "cpu":
        return find_hardware(name)
    if name == "cpu" or not re.search(r"NVIDIA|\b[AHB]\d00\b", device):
        return measure_cpu(run.override(precision="fp32"), num_devices)
    known = [key for key in HARDWARE if re.search(rf"\b{key}\b", device, re.IGNORECASE)]
    if not known:
        raise ConfigError(f"the run's device {device} is none of {', '.join(HARDWARE)}; name the machine that is most "
                          "like it with --hardware")
    return find_hardware(known[0])


def fit(hardware: Hardware, measured: dict[str, float], predicted: dict[str, float]) -> Hardware:
    """The machine with its rates divided by measured over predicted, part by part.

    Without parts all rates get the factor of the whole step.
    """
    whole = measured["step"] / predicted["step"]
    passes = measured.get(_PASSES, whole * predicted[_PASSES]) / predicted[_PASSES]
    reduction = measured.get(_REDUCTION, 0.0) / predicted[_REDUCTION] if predicted[_REDUCTION] else 1.0
    optimizer = measured.get(_OPTIMIZER, whole * predicted[_OPTIMIZER]) / predicted[_OPTIMIZER]
    # Products and element-wise kernels both have a part that is the memory's.
    rates = [name for name in hardware.figures if name.endswith("_best_share") or name.startswith("all_to_all")
             or name == "memory_bandwidth"]
    figures = dict(hardware.figures)
    for name in rates:
        figures[name] = _fitted(figures[name], 1 / passes)
    if reduction > 0:
        for name in ("nvlink_bandwidth", "network_bandwidth"):
            figures[name] = _fitted(figures[name], 1 / reduction)
    for name in ("nvlink_latency", "network_latency", "operation_overhead"):
        if name in figures:
            figures[name] = _fitted(figures[name], passes)
    movement = {**hardware.movement, "optimizer": _fitted(hardware.movement["optimizer"], passes / optimizer)}
    attention = tuple(AttentionPoint(point.is_backward, point.seq_length, point.share / passes)
                      for point in hardware.attention)
    return Hardware(f"{hardware.name}-fitted", figures, hardware.products, attention, movement,
                    hardware.tables_source + ", fitted to a run")


def _fitted(figure: Figure, factor: float) -> Figure:
    return Figure(figure.value * factor, f"{figure.source}; x {factor:.4g} fitted to a run")


# -- micro-benchmarks --------------------------------------------------------------------------------------------


def measure_cpu(run: RunConfig, num_processes: int, *, rounds: int = _ROUNDS) -> Hardware:
    """This machine by micro-benchmarks, on as many processes at once as the run has.

    Args:
        run: A run of one phase, valid on so many processes.
        num_processes: Processes at once, at least 1; each on one thread.
        rounds: Timings of each operation.

    Raises:
        ConfigError: a process failed, or the run has products that are not measured here.
    """
    if run.fp8.is_enabled or run.training.precision == "bf16":
        what = "fp8=blockwise" if run.fp8.is_enabled else "precision=bf16"
        raise ConfigError(f"{what}: on a CPU products are measured in fp32 alone; plan with --precision fp32 and "
                          "without --fp8, or fit a machine to a run's logs with --calibrate")
    with tempfile.TemporaryDirectory(prefix="micro-benchmarks-") as name:
        folder = Path(name)
        (folder / "run.json").write_text(json_text(run.as_dict()), encoding="utf-8")
        try:
            run_ranks(["-m", __name__, name, str(rounds)], num_processes)
        except RuntimeError as error:
            raise ConfigError(f"micro-benchmarks on {num_processes} processes failed: {str(error)[-400:]}") from error
        return load_hardware(str(folder / "hardware.json"))


def run_ranks(arguments: list[str], num_processes: int) -> list[str]:
    """Run a Python command in processes with torchrun's environment, each on one thread.

    Args:
        arguments: Arguments of the interpreter: a script, or "-m" and a module.
        num_processes: Processes to start on this machine.

    Returns:
        What each printed to stdout, by rank.

    Raises:
        RuntimeError: one failed; with the end of what it wrote to stderr.
    """
    common = {**environment_of_child(), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(num_processes),
              "MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(free_port())}
    processes = [subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                  text=True, env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
                 for rank in range(num_processes)]
    try:
        outputs = [process.communicate() for process in processes]
    finally:
        for process in processes:  # of a command that is stopped
            process.kill()
    failed = [error for process, (_, error) in zip(processes, outputs, strict=True) if process.returncode]
    if failed:
        raise RuntimeError(failed[0].strip()[-2000:])
    return [output for output, _ in outputs]


def _measure(folder: Path, rounds: int) -> None:
    """One process of `measure_cpu`."""
    from dsv3_megatron.parallel.groups import (
        create_groups,
        destroy_groups,
        start_process_group,
        world_size_from_environment,
    )
    from dsv3_megatron.planning.machine.hardware import save_hardware
    from dsv3_megatron.platform import prepare
    from dsv3_megatron.process.parent import end_with_parent

    end_with_parent()
    device = prepare()
    from dsv3_megatron.planning.machine.micro_benchmarks import MicroBenchmarks

    start_process_group(device)
    run = parse_command(["--config", str(folder / "run.json")]).run
    benchmarks = MicroBenchmarks(run, world_size_from_environment(), groups=create_groups(run.parallel, 0))
    for _ in range(rounds):
        benchmarks.round()
    if os.environ["RANK"] == "0":
        save_hardware(benchmarks.hardware(), str(folder / "hardware.json"))
    destroy_groups()


if __name__ == "__main__":
    _measure(Path(sys.argv[1]), int(sys.argv[2]))
