"""Bytes that go to other ranks, and how long they take."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from dsv3_megatron.config.parallel import ParallelConfig
from dsv3_megatron.config.presets import preset
from dsv3_megatron.model.router import choose_experts
from dsv3_megatron.planning.machine.hardware_tables import find_hardware
from dsv3_megatron.planning.run_cost import main_phase, only_phase
from dsv3_megatron.planning.time.dispatch_bytes import Carried, expected_destinations
from dsv3_megatron.planning.time.network import Network
from dsv3_megatron.planning.time.operations import TokenExchange, WorkPart
from tests.unit.planning.time.setting import operations_of


def _enumerated(experts: int, groups: int, kept: int, top: int, parts: int) -> float:
    """Mean number of parts among all choices of groups and of experts in them, all equally likely."""
    size, part, total, number = experts // groups, experts // parts, 0, 0
    for chosen_groups in itertools.combinations(range(groups), kept):
        within = [expert for expert in range(experts) if expert // size in chosen_groups]
        for chosen in itertools.combinations(within, top):
            total, number = total + len({expert // part for expert in chosen}), number + 1
    return total / number


@pytest.mark.parametrize(("groups", "kept", "top"), [(1, 1, 3), (1, 1, 2), (4, 4, 2)])
@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_destinations_of_a_token_are_those_of_all_choices(groups: int, kept: int, top: int, parts: int) -> None:
    model = dataclasses.replace(preset("tiny").model, num_experts=8, moe_router_num_groups=groups,
                                moe_router_group_topk=kept, moe_router_topk=top)
    assert expected_destinations(model, parts) == pytest.approx(_enumerated(8, groups, kept, top, parts))


@pytest.mark.parametrize(("experts", "groups", "kept", "top"), [
    (256, 8, 4, 8), (64, 8, 2, 6), (8, 4, 2, 3), (8, 2, 1, 2), (16, 4, 3, 4)])
def test_destinations_of_tokens_that_keep_the_best_groups_are_those_that_the_router_gives(
        experts: int, groups: int, kept: int, top: int) -> None:
    """Other tokens than the planner's, and the run's own router."""
    model = dataclasses.replace(preset("tiny").model, num_experts=experts, moe_router_num_groups=groups,
                                moe_router_group_topk=kept, moe_router_topk=top)
    scores_TE = torch.sigmoid(torch.randn(16384, experts, generator=torch.Generator().manual_seed(5)))
    ids_TK = choose_experts(scores_TE, torch.zeros(experts), top_k=top, num_groups=groups, group_top_k=kept)
    for parts in (2, groups, experts // 2, experts):
        counted = sum(len(set(row)) for row in (ids_TK * parts // experts).tolist()) / len(ids_TK)
        assert expected_destinations(model, parts) == pytest.approx(counted, rel=0.01)


def test_bytes_of_a_token_are_those_of_the_report() -> None:
    """7,392 and 14,336 bytes for each destination, four nodes at most (dsv3 report, sections 2.1.2 and 3.2.2).

    Gates go out with the rows, and their gradients back: 16 bytes more, which keeps rows at multiples of 16.
    """
    run = preset("dsv3-671b")
    run = only_phase(run, main_phase(run)).override(fp8="blockwise")
    _, operations = operations_of(run)
    sizes = {(operation.part, operation.name, operation.row_bytes, operation.carried) for operation in operations
             if isinstance(operation, TokenExchange)}
    assert sizes == {(WorkPart.FORWARD, "dispatch", 7392, Carried.ROUTING),
                     (WorkPart.FORWARD, "combine", 14336, Carried.NOTHING),
                     (WorkPart.INPUT, "dispatch", 7392, Carried.NOTHING),
                     (WorkPart.INPUT, "combine", 14336, Carried.GATES)}
    network = Network(run.parallel, find_hardware("h800"), 2048)
    assert network.expert_nodes == (8, 8) and network.dispatcher == "node"
    nodes, ranks = (expected_destinations(run.model, parts) for parts in (8, 64))
    assert 3.5 < nodes < 4
    traffic = network.exchange_traffic(run.model, 4096, 7392, Carried.ROUTING)
    assert traffic.network == pytest.approx(4096 * (7392 + 8 * 6) * nodes * 7 / 8)
    assert traffic.nvlink == pytest.approx(4096 * (7392 + 8 * 6) * ranks * 7 / 8)
    every = dataclasses.replace(run.parallel, moe_token_dispatcher_type="alltoall")
    every = dataclasses.replace(network, parallel=every).exchange_traffic(run.model, 4096, 7392, Carried.ROUTING)
    assert every.network == pytest.approx(4096 * 7408 * 8 * 7 / 8)
    assert every.nvlink == pytest.approx(4096 * 7408 * 8 * 7 / 64)


def test_an_exchange_takes_the_longer_link_and_a_leg_of_the_other() -> None:
    run = preset("dsv3-671b")
    hardware = find_hardware("h800")
    network = Network(run.parallel, hardware, 2048)
    traffic = network.exchange_traffic(run.model, 4096, 7392)
    links = (traffic.network / hardware["all_to_all_network_bandwidth"],
             traffic.nvlink / hardware["all_to_all_nvlink_bandwidth"])
    assert network.exchange_seconds(run.model, 4096, 7392) == pytest.approx(max(links) + min(links) / 4, rel=0.02)
    # DeepEP's kernels pass rows on one by one; it counts what stays on its node too: 51 GB/s.
    flex = dataclasses.replace(network, parallel=dataclasses.replace(run.parallel, moe_token_dispatcher_type="flex"))
    seconds = flex.exchange_seconds(run.model, 4096, 7392)
    assert 4096 * 7392 * expected_destinations(run.model, 8) / seconds == pytest.approx(51e9, rel=0.01)


def test_experts_on_one_node_use_no_network() -> None:
    run = preset("dsv3-16b")
    network = Network(run.parallel, find_hardware("h800"), 8)
    traffic = network.exchange_traffic(run.model, 4096, 4096)
    assert traffic.network == 0 and traffic.nvlink > 0
    alone = Network(ParallelConfig(), find_hardware("h800"), 8)
    assert alone.exchange_seconds(run.model, 4096, 4096) == 0


def test_rings_share_the_cards_of_a_node() -> None:
    parallel = ParallelConfig(expert_model_parallel_size=8)
    network = Network(parallel, find_hardware("h800"), 64)
    # 64 dense replicas, eight on a node: NVLink bounds; experts' 8 replicas, one on a node: a card each.
    dense, experts = network.reduction_seconds(1e9, 0), network.reduction_seconds(0, 1e9)
    assert dense == pytest.approx(1e9 * 63 / 64 / 160e9, rel=0.01)
    assert experts == pytest.approx(1e9 * 7 / 8 / 40e9, rel=0.01)


def test_ranks_of_a_sequence_are_next_to_each_other() -> None:
    """CP x TP ranks within a node of 8 go over NVLink; more over the network, where each has a card of its own."""
    h800, num_bytes = find_hardware("h800"), 1e9
    for tp, cp, link in ((1, 8, "nvlink"), (2, 4, "nvlink"), (2, 8, "network"), (1, 16, "network")):
        network = Network(ParallelConfig(tensor_model_parallel_size=tp, context_parallel_size=cp), h800, 2048)
        seconds = num_bytes / h800[f"{link}_bandwidth"]
        assert network.ring_step_seconds(num_bytes) == pytest.approx(seconds + h800[f"{link}_latency"])
        assert network.sequence_exchange_seconds(num_bytes) > seconds
