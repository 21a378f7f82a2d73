"""What a message of a configuration suggests would be accepted: not by the rule that was broken alone."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.presets import preset
from dsv3_megatron.config.run import RunConfig

_VALUES = r"(\w+(?:(?:, | or )\w+)*)"


def suggestions(message: str, field: str) -> list[dict[str, Any]]:
    """Changes that a message suggests; `field` is the one that it is about."""
    found: list[dict[str, Any]] = []
    for named in re.finditer(r"(?:try|or) ((?:\w+=\w+)(?: (?:with|or) \w+=\w+)*)", message.partition(";")[2]):
        found.append({name: int(value) if value.isdigit() else value
                      for name, value in re.findall(r"(\w+)=(\w+)", named[1])})
    for plain in re.finditer(rf"try {_VALUES}(?=$|,| or )", message):
        found += [{field: int(value)} for value in re.findall(r"\d+", plain[1])]
    for other in re.finditer(rf"a micro_batch_size of {_VALUES}", message):
        found += [{"micro_batch_size": int(value)} for value in re.findall(r"\d+", other[1])]
    return found


def rule_of(message: str) -> str:
    """What a message is about, without its values."""
    return re.sub(r"\d+", "N", message.partition(";")[0])


def broken(run: RunConfig, world_size: int | None) -> str | None:
    try:
        run.validate(world_size)
    except ConfigError as error:
        return str(error)
    return None


@settings(max_examples=400, deadline=None)
@given(
    st.fixed_dictionaries({}, optional={
        "num_layers": st.integers(1, 9), "num_experts": st.sampled_from([4, 6, 8, 12, 16]),
        "moe_router_num_groups": st.integers(1, 7), "moe_router_group_topk": st.integers(1, 5),
        "moe_router_topk": st.integers(1, 6), "expert_model_parallel_size": st.integers(1, 9),
        "tensor_model_parallel_size": st.integers(1, 5), "pipeline_model_parallel_size": st.integers(1, 6),
        "num_virtual_stages_per_pipeline_rank": st.integers(1, 3),
        "pipeline_schedule": st.sampled_from(["auto", "1f1b", "interleaved", "zb1p", "zbv", "dualpipe", "dualpipev"]),
        "overlap_moe_expert_parallel_comm": st.booleans(), "micro_batch_size": st.integers(1, 6),
        "global_batch_size": st.integers(1, 24)}),
    st.none() | st.integers(1, 12))
def test_what_is_suggested_does_not_break_the_rules_that_are_checked_with_it(changes: dict[str, Any],
                                                                             world_size: int | None) -> None:
    """The rule itself is then kept, and no rule before it is broken: the next message, if any, is a later one."""
    run = preset("tiny").override(**changes)
    message = broken(run, world_size)
    if message is None:
        return
    field = message.partition("=")[0]
    for change in suggestions(message, field):
        after = broken(run.override(**change), world_size)
        assert after is None or rule_of(after) != rule_of(message), (message, change, after)
        if set(change) & {"moe_router_num_groups", "moe_router_group_topk"}:
            assert after is None or not after.startswith("moe_router_"), (message, change, after)


@pytest.mark.parametrize(("changes", "world_size", "way_out"), [
    ({"expert_model_parallel_size": 3}, None, "try 1, 2 or 4"),
    ({"moe_router_num_groups": 3, "moe_router_group_topk": 2, "moe_router_topk": 4}, None, "try 2 or 4"),
    # Groups of which a token may not go to three: only as many, and with topk 6 no smaller group will do.
    ({"moe_router_num_groups": 5, "moe_router_group_topk": 3, "moe_router_topk": 6, "num_experts": 8}, None, "try 4"),
    ({"pipeline_schedule": "dualpipe", "pipeline_model_parallel_size": 3, "num_layers": 6}, None,
     "try 2 or 4, or pipeline_schedule=dualpipev"),
    ({"pipeline_schedule": "dualpipe", "pipeline_model_parallel_size": 3}, None, "try 2 or 4"),
    ({"pipeline_schedule": "dualpipe", "pipeline_model_parallel_size": 3, "num_layers": 3}, None, "try 2"),
    ({"overlap_moe_expert_parallel_comm": True, "pipeline_schedule": "1f1b", "pipeline_model_parallel_size": 2}, None,
     "try pipeline_schedule=interleaved with num_virtual_stages_per_pipeline_rank=2"),
    ({"overlap_moe_expert_parallel_comm": True, "pipeline_model_parallel_size": 4}, None,
     "try pipeline_schedule=dualpipe"),
])
def test_ways_out(changes: dict[str, Any], world_size: int | None, way_out: str) -> None:
    message = broken(preset("tiny").override(**changes), world_size)
    assert message is not None and message.endswith(way_out), message
