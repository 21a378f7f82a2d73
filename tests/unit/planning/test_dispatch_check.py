"""What is said of the way to the experts before a run starts."""

from __future__ import annotations

import pytest

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.presets import preset
from dsv3_megatron.planning.dispatch_check import check_dispatch

V3 = preset("dsv3-671b").override(pipeline_model_parallel_size=16, expert_model_parallel_size=64)


def test_nothing_is_said_of_experts_on_one_rank() -> None:
    assert check_dispatch(preset("tiny"), 8) == []


def test_nodes_that_match_the_routers_groups() -> None:
    (told,) = check_dispatch(V3, 8)
    assert not told.is_warning and told.text == "experts: on 64 ranks, dispatcher node, 8 ranks a node"
    (told,) = check_dispatch(V3.override(moe_token_dispatcher_type="alltoall"), 4)
    assert not told.is_warning and "dispatcher alltoall" in told.text


def test_groups_that_straddle_nodes_are_warned_of_with_their_bytes() -> None:
    told = check_dispatch(V3.override(fp8="none"), 4)
    assert [line.is_warning for line in told] == [False, True]
    assert "the router's 8 groups of experts are not whole on 16 nodes" in told[1].text
    # Out and home, forward and backward, in bf16: 4 x 14,336, with 8 gates and ids out and 8 gates home.
    bytes_of_a_row = 4 * 14336 + 48 + 32
    from dsv3_megatron.planning.time.dispatch_bytes import bytes_of_straddling_groups

    assert f"{bytes_of_straddling_groups(V3.model, 16, bytes_of_a_row):,.0f} bytes" in told[1].text


def test_what_cannot_be() -> None:
    with pytest.raises(ConfigError, match="64 ranks do not lie evenly on nodes of ranks_per_node=12"):
        check_dispatch(V3.override(moe_token_dispatcher_type="node"), 12)
    for backend in ("deepep", "hybridep"):
        with pytest.raises(ConfigError, match=f"moe_flex_dispatcher_backend={backend} needs the package deep_ep, which "
                                              "is not installed; install DeepEP"):
            check_dispatch(V3.override(moe_token_dispatcher_type="flex", moe_flex_dispatcher_backend=backend), None)
