"""Weights, gradients and optimizer states: against the parameter table and Megatron-Core's own padding."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_megatron.config.presets import preset
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.metrics.parameters import optimizer_bytes_per_parameter, rank_parameters, weight_bytes_per_parameter
from dsv3_megatron.metrics.rank_state import checkpoint_bytes, padded_numel, rank_states
from dsv3_megatron.parallel.layout import stage_layouts
from dsv3_megatron.planning.memory.estimate import estimate_memory
from dsv3_megatron.reports.model_table import model_summary

TP, PP, EP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size"
RUNS: list[tuple[str, int, dict[str, Any]]] = [
    ("tiny", 1, {"precision": "fp32"}),
    ("tiny", 4, {PP: 2, EP: 2, "precision": "bf16", "ema_decay": 0.9}),
    ("tiny", 8, {TP: 2, PP: 2, "expert_tensor_parallel_size": 2, "precision": "bf16"}),
    ("tiny", 2, {PP: 2, "pipeline_model_parallel_layout": "Etttt|mL", "precision": "bf16"}),
    ("tiny", 2, {PP: 2, "pipeline_model_parallel_layout": "E|ttttmL", "precision": "bf16"}),
    ("tiny", 8, {PP: 4, "pipeline_model_parallel_layout": "Ett|tt|m|L", "precision": "bf16"}),
    ("tiny", 2, {PP: 2, "num_virtual_stages_per_pipeline_rank": 2, "pipeline_model_parallel_layout": "Ett|t|tm|L",
                 "precision": "bf16"}),
    ("laptop", 4, {PP: 2, "pipeline_schedule": "dualpipe", "global_batch_size": 32, "precision": "bf16"}),
    ("laptop", 8, {PP: 2, EP: 4, "pipeline_schedule": "zbv", "precision": "bf16"}),
    ("dsv3-16b", 64, {PP: 4, "precision": "bf16", "mtp_num_layers": 2}),
    ("dsv3-671b", 2048, {"pipeline_schedule": "dualpipe", "precision": "bf16"}),
    ("dsv3-671b", 1024, {TP: 2, PP: 8, EP: 32, "precision": "bf16"}),
]


def run_of(name: str, settings: dict[str, Any]) -> RunConfig:
    return preset(name).override(**settings)


@pytest.mark.parametrize(("name", "world_size", "settings"), RUNS)
def test_counts_are_the_parameter_table_s_and_bytes_hold_padding_besides(name: str, world_size: int,
                                                                        settings: dict[str, Any]) -> None:
    run = run_of(name, settings)
    table = rank_parameters(run, stage_layouts(run.model, run.parallel))
    parallel, copies = run.parallel, run.parallel.num_model_copies
    states = rank_states(run, world_size, precision=run.training.precision)
    assert [state.parameters for state in states] == [rank.parameters for rank in table]
    for state, rank in zip(states, table, strict=True):
        # Padding is at most an alignment of 64 a tensor and the group's size a buffer.
        allowed = (200 * len(rank.layer_ids) * 64 + 8 * max(world_size, 128)) * 4
        assert 0 <= state.gradient_bytes - 4 * rank.parameters <= allowed
        weights = weight_bytes_per_parameter(run.training.precision) * rank.parameters
        assert 0 <= state.parameter_bytes - weights <= allowed
        owned = (-(-rank.dense_parameters // (parallel.data_parallel_size(world_size) * copies))
                 + -(-rank.expert_parameters // (parallel.expert_data_parallel_size(world_size) * copies)))
        states = state.master_bytes + state.moment_bytes
        assert abs(states - owned * optimizer_bytes_per_parameter(run.training)) <= max(allowed * 4 // world_size, 4096)
        average = owned * 4 if run.training.ema_decay else 0
        assert abs(state.average_bytes - average) <= max(allowed // world_size, 4096)


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=20), st.integers(1, 300))
def test_padding_is_megatron_core_s(numels: list[int], group_size: int) -> None:
    from megatron.core.optimizer.param_layout import pad_bucket_end, pad_param_start

    end = 0
    for numel in numels:
        end = pad_param_start(end) + numel
    assert padded_numel(numels, group_size) == pad_bucket_end(end, group_size, False)


def test_narrow_moments_take_half_and_scratch() -> None:
    wide, narrow = (rank_states(preset("tiny").override(precision="bf16", exp_avg_dtype=dtype, exp_avg_sq_dtype=dtype),
                                1, precision="bf16")[0] for dtype in ("fp32", "bf16"))
    assert narrow.moment_bytes * 2 == wide.moment_bytes
    assert (wide.scratch_bytes, narrow.scratch_bytes) == (0, 5 * 4 * (1 << 17))


@pytest.mark.parametrize(("name", "world_size", "settings"), RUNS)
def test_print_model_and_the_plan_give_one_number(name: str, world_size: int, settings: dict[str, Any]) -> None:
    """What a rank holds between steps, in --print-model --json and in an estimate of the peak."""
    run = run_of(name, settings)
    printed = model_summary(run, world_size, stage_layouts(run.model, run.parallel))["ranks"]
    estimated = estimate_memory(run, world_size)
    assert [(rank["weight_bytes"], rank["gradient_bytes"], rank["optimizer_bytes"], rank["host_bytes"])
            for rank in printed] == [(rank.parameter_bytes, rank.gradient_bytes, rank.optimizer_bytes, rank.host_bytes)
                                     for rank in estimated]


def test_the_size_of_a_checkpoint() -> None:
    """Of each parameter: the weight, its fp32 copy, two moments in their dtypes, the average."""
    count = 671_026_404_352 + 11_610_067_968
    run = preset("dsv3-671b").override(precision="bf16")
    assert checkpoint_bytes(run) == count * (2 + 4 + 2 + 2 + 4)
    assert checkpoint_bytes(run.override(ema_decay=0.0, exp_avg_sq_dtype="fp32")) == count * (2 + 4 + 2 + 4)
    # `du -sb` of such a checkpoint: 37,409,446.
    assert checkpoint_bytes(preset("tiny").override(precision="fp32")) == (1_876_480 + 417_504) * (4 + 4 + 4 + 4)
