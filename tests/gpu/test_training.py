"""Training steps on the GPU as the launcher takes them: the loss falls; tokens/s and peak memory are written down.

Rows go to $GPU_REPORT/training_throughput.csv, in the columns of tools/bench/results, where that variable is set
(`.ci/run_gpu` sets it); they are printed in any case. Legend: S sequence, B micro-batch.
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

WARM_UP_STEPS, TIMED_STEPS = 5, 20
LAPTOP = {"seq_length": 512, "micro_batch_size": 4, "global_batch_size": 16}


@pytest.mark.parametrize("impl", ["local", "transformer_engine"])
def test_tiny_learns(runs, request, impl):
    """At the launcher's default precision, in fifty steps, most of what there is to know of eight sequences."""
    if impl == "transformer_engine":
        request.getfixturevalue("engine")
    with runs.trainer(runs.run_config(precision="auto", transformer_impl=impl, global_batch_size=8)) as trainer:
        assert trainer.precision == "bf16", "every GPU from Ampere on"
        losses = [trainer.step() for _ in range(50)]
    print(f"{impl}: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    assert losses[0] > 7.5 and losses[-1] < 0.5 * losses[0], losses[::10]


@pytest.mark.parametrize("impl, precision", [("local", "bf16"), ("transformer_engine", "bf16"), ("local", "fp32")])
def test_laptop_throughput(runs, request, impl, precision):
    version = f" {request.getfixturevalue('engine')}" if impl == "transformer_engine" else ""
    run = runs.run_config("laptop", precision=precision, transformer_impl=impl, **LAPTOP)
    torch.cuda.reset_peak_memory_stats()
    with runs.trainer(run) as trainer:
        losses, seconds = [], []
        for _ in range(WARM_UP_STEPS + TIMED_STEPS):
            torch.cuda.synchronize()
            started = time.perf_counter()
            losses.append(trainer.step())
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
    seconds = seconds[WARM_UP_STEPS:]
    tokens = run.training.tokens_per_step
    # The micro-batches hold random tokens of which the model has seen each a dozen times.
    assert losses[-1] < losses[0] - 0.5, losses
    config = (f"laptop {precision} seq=512 batch=4x4 mtp=1 {impl}{version}")
    write([
        ("throughput", tokens / statistics.median(seconds), "token/s"),
        ("step_time_median", statistics.median(seconds), "s"),
        ("step_time_min", min(seconds), "s"),
        ("step_time_max", max(seconds), "s"),
        ("num_steps", len(seconds), "1"),
        ("peak_memory_allocated", torch.cuda.max_memory_allocated() / 1e9, "GB"),
    ], config, runs.prepare().name)


def write(numbers: list[tuple[str, float, str]], config: str, device: str) -> None:
    """Print measurements, and append them to the report's CSV if there is one."""
    from tools.bench.records import Measurement, append_rows

    for metric, value, unit in numbers:
        print(f"{config}: {metric} {value:.6g} {unit}")
    if os.environ.get("GPU_REPORT"):
        append_rows(str(Path(os.environ["GPU_REPORT"]).resolve() / "training_throughput.csv"),
                    [Measurement("dsv3_megatron", config, *number) for number in numbers], device)
