"""What is made of the counts, and the error when a token goes to too many groups."""

from __future__ import annotations

import pytest

from dsv3_megatron.metrics.measurements import Measurements, NodeLimitError, RouterMeasurements, check_node_limit
from dsv3_megatron.metrics.scalars import measurement_scalars


def router(tokens_by_num_groups: list[int], tokens_per_group: list[int] | None = None) -> RouterMeasurements:
    return RouterMeasurements([0, 4], tokens_per_group or [3, 1, 2], tokens_by_num_groups, [0.0, 0.5])


def test_groups_per_token() -> None:
    assert router([0, 4, 1, 0]).groups_per_token == 6 / 5
    assert router([0, 4, 1, 0]).most_groups_per_token == 2
    assert router([0, 0, 0]).groups_per_token == router([0, 0, 0]).most_groups_per_token == 0


def test_node_limit() -> None:
    check_node_limit({1: router([0, 4, 1, 0])}, 2)
    with pytest.raises(NodeLimitError, match=r"layer 7: 3 of 8 tokens went to more than moe_router_group_topk=2 groups "
                       "of experts, one to 4; the router does not keep the node limit"):
        check_node_limit({1: router([0, 4, 1, 0, 0]), 7: router([0, 4, 1, 2, 1])}, 2)


def test_scalars() -> None:
    seen = Measurements({1: router([0, 6, 0, 0]), 4: router([0, 2, 2, 0], [1, 1, 4])}, {"router": 2.0}, (0.75, None),
                        {"data": 0.1}, {"data": 0.3}, {"host-peak-resident": 7})
    assert measurement_scalars(seen) == {
        "grad-norm/router": 2.0, "mtp_1 agreement": 0.75, "time/data": 0.1, "time-slowest-rank/data": 0.3,
        "memory/host-peak-resident": 7, "expert-groups/layer-1/groups-per-token": 1.0,
        "expert-groups/layer-1/max-violation": 0.5, "expert-groups/layer-4/groups-per-token": 1.5,
        "expert-groups/layer-4/max-violation": 1.0, "expert-groups/most-groups-per-token": 2,
        "expert-groups/group-0": 2.0, "expert-groups/group-1": 1.0, "expert-groups/group-2": 3.0}
    one_group = Measurements({1: router([0, 6], [6])}, {}, (), {}, {}, {})
    assert measurement_scalars(one_group) == {}
