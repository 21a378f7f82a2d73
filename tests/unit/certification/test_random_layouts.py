"""Layouts at random are valid, the same for a seed, and over all dimensions."""

from __future__ import annotations

import pytest

from dsv3_megatron.certification.random_layouts import random_layouts
from dsv3_megatron.certification.random_samples import EOD, RandomSamples
from dsv3_megatron.certification.shrunk_run import shrink
from dsv3_megatron.config.data import DataConfig
from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.load import parse_command
from dsv3_megatron.config.parallel import CP_COMM_TYPES
from dsv3_megatron.config.pipeline import SCHEDULES


def test_a_seed_gives_the_same_layouts_whatever_their_number() -> None:
    assert list(random_layouts(3, 7, 4)) == list(random_layouts(6, 7, 4))[:3]
    assert list(random_layouts(3, 7, 4)) != list(random_layouts(3, 8, 4))


def test_every_dimension_is_among_them_and_every_layout_is_possible() -> None:
    runs = []
    for world_size, flags in random_layouts(150, 1, 8):
        assert 1 <= world_size <= 8
        runs.append(shrink(parse_command(flags).run, world_size, 8).run)
    parallel, training = [run.parallel for run in runs], [run.training for run in runs]
    assert {part.schedule for part in parallel if part.pipeline_model_parallel_size > 1} == set(SCHEDULES)
    for name, values in (("tensor_model_parallel_size", {1, 2}), ("context_parallel_size", {1, 2, 4}),
                         ("cp_comm_type", {"p2p", "all_gather", "a2a"}), ("pipeline_model_parallel_size", {1, 2, 4}),
                         ("expert_model_parallel_size", {1, 2, 4}), ("expert_tensor_parallel_size", {1, 2}),
                         ("num_virtual_stages_per_pipeline_rank", {1, 2, 3}),
                         ("overlap_moe_expert_parallel_comm", {False, True})):
        assert values <= {getattr(part, name) for part in parallel}, name
    assert {run.model.mtp_num_layers for run in runs} == {0, 1, 2}
    assert {part.recompute_granularity for part in training} == {None, "selective", "full"}
    assert {run.fp8.is_enabled for run in runs} == {run.data.reset_attention_mask for run in runs} == {False, True}
    layouts = {part.pipeline_model_parallel_layout for part in parallel} - {None}
    assert any(layout.startswith("E|") for layout in layouts) and any(layout.endswith("|L") for layout in layouts)
    assert any(layout.endswith("|mL") for layout in layouts) and len(layouts) > 20


def test_layouts_that_split_sequences_are_over_every_other_dimension_too() -> None:
    runs = []
    for world_size, flags in random_layouts(200, 3, 4, splits_sequences=True):
        run = shrink(parse_command(flags).run, world_size, 4).run
        runs.append((run, run.parallel.data_parallel_size(world_size)))
    parallel = [run.parallel for run, _ in runs]
    assert {part.context_parallel_size for part in parallel} == {2, 4}
    assert {part.cp_comm_type for part in parallel} == set(CP_COMM_TYPES)
    assert {part.schedule for part in parallel if part.pipeline_model_parallel_size > 1} == set(SCHEDULES)
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_tensor_parallel_size"):
        assert {getattr(part, name) for part in parallel} == {1, 2}, name
    assert {part.expert_model_parallel_size for part in parallel} == {1, 2, 4} and {size for _, size in runs} == {1, 2}
    assert {run.model.mtp_num_layers for run, _ in runs} == {0, 1, 2}
    assert {run.model.rope_type for run, _ in runs} == {"rope", "yarn"}
    assert {run.training.recompute_granularity for run, _ in runs} == {None, "selective", "full"}
    assert {run.data.reset_attention_mask for run, _ in runs} == {False, True}


def test_one_process_splits_no_sequence() -> None:
    with pytest.raises(ConfigError, match="--with context needs at least 2 processes for a layout, and 1 may be "
                                          "started; give --processes 2"):
        next(random_layouts(1, 1, 1, splits_sequences=True))


def test_random_conversations_say_where_they_end() -> None:
    samples = RandomSamples(3, 24, 40, data=DataConfig(sft=True))
    for index in range(3):
        sample = samples[index]
        starts = [0, *(position + 1 for position in range(23) if sample["tokens"][position] == EOD), 24]
        assert list(sample["document_bounds"]) == starts and len(starts) > 2
        assert sample["position_ids"].tolist() == [position - max(start for start in starts if start <= position)
                                                   for position in range(24)]
    assert "document_bounds" not in RandomSamples(3, 24, 40, data=DataConfig(reset_attention_mask=True))[0]
