"""The pass that measures what modules take beside their operations, over stages and expert ranks."""

from __future__ import annotations

import pytest
import torch

from dsv3_megatron.config.presets import preset
from dsv3_megatron.parallel.groups import create_groups
from dsv3_megatron.planning.machine.micro_benchmarks import MicroBenchmarks
from dsv3_megatron.planning.machine.narrow_pass import narrowed
from dsv3_megatron.planning.run_cost import main_phase, only_phase
from tests.distributed.launch import run_ranks

pytestmark = pytest.mark.distributed


def overheads() -> tuple[float, float, float]:
    """Of PP2 x EP2: seconds of a pass, and of an operation with and without it."""
    base = preset("tiny").override(pipeline_model_parallel_size=2, expert_model_parallel_size=2, seq_length=32,
                                   micro_batch_size=1, global_batch_size=4, precision="fp32")
    run = only_phase(base, main_phase(base))
    narrow = narrowed(run)
    assert (narrow.model.num_layers, narrow.model.num_experts) == (run.model.num_layers, run.model.num_experts)
    found = []
    for groups in (create_groups(run.parallel, 0), None):
        benchmarks = MicroBenchmarks(run, torch.distributed.get_world_size(), groups=groups)
        benchmarks.round()
        found.append(benchmarks.hardware("cpu")["operation_overhead"])
        if groups is not None:
            (case,) = (case for case in benchmarks.cases if case.key == ("narrow_pass",))
            seconds = case.seconds["cpu"][0]
            assert found[0] <= seconds / benchmarks.num_kernels
    return seconds, *found


def test_what_modules_take_is_spread_over_their_operations() -> None:
    for seconds, overhead, without in run_ranks(4, overheads):
        assert 0 < overhead < seconds and without == 0.0
