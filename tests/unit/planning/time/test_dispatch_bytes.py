"""Destinations and bytes of tokens, against every choice of experts that there is."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from dsv3_megatron.config.presets import preset
from dsv3_megatron.planning.time.dispatch_bytes import (
    Carried,
    bytes_of_row,
    bytes_of_straddling_groups,
    destinations,
)

SMALL = dataclasses.replace(preset("tiny").model, num_experts=8, moe_router_num_groups=1, moe_router_group_topk=1,
                            moe_router_topk=3)


def all_choices() -> list[tuple[int, ...]]:
    """Every token's experts: each choice of three."""
    return list(itertools.combinations(range(8), 3))


@pytest.mark.parametrize(("num_nodes", "size"), [(1, 4), (2, 1), (2, 2), (4, 1), (2, 4), (4, 2)])
def test_destinations_are_those_of_all_tokens(num_nodes: int, size: int) -> None:
    """Walk each token from each rank, by the words of the report (section 3.2.2)."""
    ranks, choices = num_nodes * size, all_choices()
    network = node = rows_out = rows_beside = 0
    for own, chosen in itertools.product(range(ranks), choices):
        at = {expert * ranks // 8 for expert in chosen}
        for there in {rank // size for rank in at}:
            came_to = there * size + own % size
            network += came_to // size != own // size
            node += sum(rank // size == there and rank != came_to for rank in at)
        for expert in chosen:
            rank = expert * ranks // 8
            rows_out += rank // size != own // size
            rows_beside += rank // size == own // size and rank != own
    count = ranks * len(choices)
    found, plain = (destinations(SMALL, way, num_nodes, size) for way in ("node", "alltoall"))
    assert (found.network, found.node) == pytest.approx((network / count, node / count))
    assert (plain.network, plain.node) == pytest.approx((rows_out / count, rows_beside / count))


def test_what_travels_with_a_row() -> None:
    """Eight gates of 4 bytes and ids of 2 for all of a token's experts; a gate alone for the one that a row is of."""
    assert [bytes_of_row("node", 7392, carried, 8) for carried in Carried] == [7392, 7440, 7424]
    assert [bytes_of_row("alltoall", 7392, carried, 8) for carried in Carried] == [7392, 7408, 7408]
    assert bytes_of_row("node", 128, Carried.ROUTING, 4) == 160, "a multiple of 16"


def test_groups_that_straddle_nodes_cost_bytes() -> None:
    """Of 8 groups of V3 on 16 nodes each lies on two, and a token goes to more than 4 nodes."""
    model = preset("dsv3-671b").model
    assert [bytes_of_straddling_groups(model, nodes, 1000) for nodes in (1, 2, 4, 8)] == [0, 0, 0, 0]
    more = bytes_of_straddling_groups(model, 16, 1000)
    assert more == pytest.approx(1000 * (destinations(model, "node", 16, 1).network
                                         - destinations(model, "node", 8, 1).network)) and more > 1000
    assert bytes_of_straddling_groups(dataclasses.replace(model, moe_router_num_groups=1, moe_router_group_topk=1), 16,
                                      1000) == 0
