"""Changes of a run as flags: what they give is read back by the command line."""

import shlex

import pytest

from dsv3_megatron.config.load import parse_command
from dsv3_megatron.config.presets import preset
from dsv3_megatron.planning.flags import differing_flags, flags


@pytest.mark.parametrize(("changes", "expected"), [
    ({"micro_batch_size": 2}, "--micro-batch-size 2"),
    ({"recompute_granularity": None}, "--recompute-granularity none"),
    ({"recompute_modules": ("mlp", "moe act")}, "--recompute-modules mlp 'moe act'"),
    ({"overlap_moe_expert_parallel_comm": True}, "--overlap-moe-expert-parallel-comm"),
    ({"overlap_moe_expert_parallel_comm": False}, "--no-overlap-moe-expert-parallel-comm"),
    ({}, "")])
def test_as_a_shell_takes_them(changes, expected):
    assert flags(changes) == expected


@pytest.mark.parametrize("changes", [
    {"expert_model_parallel_size": 4, "micro_batch_size": 2},
    {"pipeline_model_parallel_size": 2, "pipeline_schedule": "dualpipe", "recompute_granularity": "selective"},
    {"pipeline_model_parallel_size": 2, "overlap_moe_expert_parallel_comm": True,
     "num_virtual_stages_per_pipeline_rank": 2, "expert_model_parallel_size": 2}])
def test_a_layout_is_read_back(changes):
    given = preset("tiny")
    found = given.override(**changes)
    again = parse_command(["--preset", "tiny", *shlex.split(differing_flags(given, found))]).run
    assert (again.parallel, again.training) == (found.parallel, found.training)
