"""Predicted against measured time of a training step on a CPU, the machine known by micro-benchmarks alone.

A setting is a layout of `laptop` on some processes. Its processes are the trainer's own, on random tokens; they take
rounds of micro-benchmarks (`planning/machine/micro_benchmarks.py`, all processes at once) and training steps in turns,
so that a disturbance of the machine meets both. The prediction reads the micro-benchmarks' medians and no training
step.

The slowest process of a round sets the pace of all.

Two clocks: "wall" is what the run takes on this machine as it is; "cpu" is the processes' own work, which other work on
the machine changes less. With several processes that wait for one another only "wall" has the waiting.

`--v3` instead predicts DeepSeek-V3 on 2048 H800 and searches its layouts, which is arithmetic: what is measured there
is the search's own time.

Usage:
    python -m tools.bench.bench_plan --settings one ep4 --rounds 5 --steps 2
    python -m tools.bench.bench_plan --v3
appends to tools/bench/results/plan.csv and prints a table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
from dsv3_megatron.config.presets import laptop  # noqa: E402
from dsv3_megatron.config.run import RunConfig  # noqa: E402
from tools.bench.records import Measurement, append_rows, load_average  # noqa: E402

# Name -> processes and what is other than one process of `laptop`.
SETTINGS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "dp4": (4, {}),
    "ep4": (4, {"expert_model_parallel_size": 4}),
    "pp2ep2": (4, {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}),
}
_MICROBATCHES = 2


def run_of(setting: str, seq_length: int, micro_batch_size: int) -> RunConfig:
    """The run of a setting: as many micro-batches on each replica."""
    processes, changes = SETTINGS[setting]
    run = laptop().override(seq_length=seq_length, micro_batch_size=micro_batch_size, precision="fp32",
                            eval_interval=0, **changes)
    replicas = run.parallel.data_parallel_size(processes)
    return run.override(global_batch_size=replicas * micro_batch_size * _MICROBATCHES)


def serve(setting: str, options: argparse.Namespace) -> None:
    """One process: steps and rounds in turns; rank 0 prints what was found as JSON."""
    import torch

    torch.set_num_threads(1)
    from tools.bench.random_run import random_token_trainer

    trainer = random_token_trainer(run_of(setting, options.seq_length, options.micro_batch_size))
    from dsv3_megatron.parallel.groups import world_size_from_environment
    from dsv3_megatron.planning.machine.micro_benchmarks import CLOCKS, MicroBenchmarks
    from dsv3_megatron.planning.run_cost import main_phase, only_phase
    from dsv3_megatron.planning.time.step_time import step_time
    from dsv3_megatron.planning.time.work import Setting

    size = world_size_from_environment()
    run = only_phase(trainer.run, main_phase(trainer.run))
    benchmarks = MicroBenchmarks(run, size, groups=trainer.groups)
    steps: dict[str, list[float]] = {clock: [] for clock in CLOCKS}
    for index in range(1 + options.rounds):
        benchmarks.round()
        for _ in range(options.steps):
            torch.distributed.barrier()
            started = {name: clock() for name, clock in CLOCKS.items()}
            trainer.train_step()
            taken = torch.tensor([clock() - started[name] for name, clock in CLOCKS.items()])
            torch.distributed.all_reduce(taken)
            if index:  # the first round warms up
                for name, seconds in zip(CLOCKS, (taken / size).tolist(), strict=True):
                    steps[name].append(seconds)
    found: dict[str, Any] = {"steps": steps}
    for clock in CLOCKS:
        step = step_time(run, Setting(benchmarks.hardware(clock), size))
        found[clock] = {"predicted": step.seconds, "busy": step.seconds - step.bubble, "breakdown": step.breakdown()}
    if os.environ.get("RANK", "0") == "0":
        print("RESULT " + json.dumps(found), flush=True)


def measure(setting: str, options: argparse.Namespace) -> dict[str, Any]:
    """Start a setting's processes; what rank 0 found.

    Raises:
        RuntimeError: a process failed.
    """
    from dsv3_megatron.planning.machine.calibrate import run_ranks

    first, *_ = run_ranks([__file__, "--serve", setting, *options.forwarded], SETTINGS[setting][0])
    line = next(line for line in first.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


def predict_v3() -> list[Measurement]:
    """DeepSeek-V3 as published on 2048 H800, beside what was published, and the time of a search over all layouts."""
    from dsv3_megatron.config.presets import preset
    from dsv3_megatron.planning.machine.hardware_tables import find_hardware
    from dsv3_megatron.planning.run_cost import main_phase, only_phase
    from dsv3_megatron.planning.search import search
    from dsv3_megatron.planning.time.step_time import step_time
    from dsv3_megatron.planning.time.work import Setting

    run = preset("dsv3-671b").override(pipeline_schedule="dualpipe", fp8="blockwise",
                                       recompute_granularity="selective")
    run, setting = only_phase(run, main_phase(run)), Setting(find_hardware("h800"), 2048)
    started = time.process_time()
    result = search(run, setting)
    seconds = time.process_time() - started
    config = "dsv3-671b 2048 x h800 PP16 EP64 dualpipe fp8"
    step = step_time(run, setting)
    published = Measurement("published", config, "gpu_hours_per_trillion_tokens", 180.2e3, "h")
    rows = [published, Measurement("predicted", config, published.metric, step.gpu_hours_per_trillion_tokens, "h"),
            Measurement("published", config, "step_time", 19.926, "s"),
            Measurement("predicted", config, "step_time", step.seconds, "s"),
            Measurement("search", config, "cpu_time", seconds, "s"),
            Measurement("search", config, "num_layouts", result.num_layouts, "1"),
            Measurement("search", config, "num_simulated", result.num_simulated, "1")]
    for row in rows:
        print(f"{row.name:10} {row.metric:32} {row.value:12.6g} {row.unit}")
    return rows


def main() -> None:
    """Measure, write the results, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=sorted(SETTINGS), default=["one", "ep4"])
    parser.add_argument("--rounds", type=int, default=5, help="of micro-benchmarks")
    parser.add_argument("--steps", type=int, default=2, help="training steps after each round")
    parser.add_argument("--seq-length", type=int, default=128)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--v3", action="store_true", help="DeepSeek-V3 on 2048 H800, and the search's time")
    parser.add_argument("--no-csv", action="store_true", help="print only")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve, options)
    options.forwarded = [f"--{name}={getattr(options, name.replace('-', '_'))}"
                         for name in ("rounds", "steps", "seq-length", "micro-batch-size")]
    from dsv3_megatron.platform import detect_device

    if options.v3:
        rows = predict_v3()
        if not options.no_csv:
            append_rows("plan.csv", rows, f"{detect_device().name}, 1 thread")
        return None
    device = f"{detect_device().name}, 1 thread a process"
    print("| Setting | clock | measured step | predicted | predicted / measured | load |\n"
          "| --- | --- | ---: | ---: | ---: | ---: |")
    for setting in options.settings:
        started = time.perf_counter()
        found = measure(setting, options)
        config = (f"laptop {setting} processes={SETTINGS[setting][0]} seq={options.seq_length} "
                  f"batch={options.micro_batch_size}x{_MICROBATCHES} rounds={options.rounds} steps={options.steps}")
        rows = []
        for clock, seconds in found["steps"].items():
            measured = statistics.median(seconds)
            # Waiting is no work of the process.
            predicted = found[clock]["predicted" if clock == "wall" else "busy"]
            print(f"| {setting} | {clock} | {measured:.3f} s | {predicted:.3f} s | {predicted / measured:.3f} | "
                  f"{load_average():.1f} |", flush=True)
            rows += [Measurement(name, config, f"{metric}_{clock}", value, unit) for name, metric, value, unit in (
                ("measured", "step_time", measured, "s"), ("measured", "step_time_min", min(seconds), "s"),
                ("measured", "step_time_max", max(seconds), "s"), ("predicted", "step_time", predicted, "s"),
                ("predicted", "ratio", predicted / measured, "1"))]
        rows.append(Measurement("machine", config, "load_average", load_average(), "1"))
        if not options.no_csv:
            append_rows("plan.csv", rows, device)
        print(f"  {setting}: {time.perf_counter() - started:.0f} s, breakdown {found['wall']['breakdown']}",
              file=sys.stderr)


if __name__ == "__main__":
    main()
