"""Operations against the FLOPs of metrics/flops.py, and bytes on the wire against enumeration and the report."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from dsv3_megatron.config.parallel import ParallelConfig
from dsv3_megatron.config.presets import preset
from dsv3_megatron.metrics.flops import flops_per_token
from dsv3_megatron.parallel.layout import stage_layouts
from dsv3_megatron.planning.machine.hardware_tables import find_hardware
from dsv3_megatron.planning.run_cost import main_phase, only_phase
from dsv3_megatron.planning.time.layer_operations import stage_operations
from dsv3_megatron.planning.time.network import Network, expected_destinations
from dsv3_megatron.planning.time.operations import Product, Shape, TokenExchange, WorkPart, model_flops


def _operations(run):
    shape = Shape.of(run)
    return shape, [operation for stage in stage_layouts(run.model, run.parallel)
                   for group in stage_operations(run, stage, shape) for operation in group]


@pytest.mark.parametrize("name", ["tiny", "laptop", "dsv3-16b", "dsv3-671b"])
@pytest.mark.parametrize("changes", [
    {}, {"fp8": "blockwise"}, {"recompute_granularity": "selective"}, {"recompute_granularity": "full"}])
def test_operations_add_up_to_the_models_flops(name: str, changes) -> None:
    run = preset(name)
    run = only_phase(run, main_phase(run)).override(**changes)
    run = dataclasses.replace(run, parallel=ParallelConfig(pipeline_model_parallel_size=2))
    shape, operations = _operations(run)
    expected = flops_per_token(run.model, run.training.seq_length).training * shape.tokens
    assert model_flops(operations) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("depth", [1, 2])
def test_heads_are_where_the_losses_are(depth: int) -> None:
    """Not where the MTP modules are; all stages together do as much as in any other layout."""
    run = preset("tiny").override(mtp_num_layers=depth)
    modules = "m" * depth
    run = dataclasses.replace(run, parallel=ParallelConfig(
        pipeline_model_parallel_size=4, pipeline_model_parallel_layout=f"Ett|tt|{modules}|L"))
    shape, operations = _operations(run)
    expected = flops_per_token(run.model, run.training.seq_length).training * shape.tokens
    assert model_flops(operations) == pytest.approx(expected, rel=1e-12)
    heads = [[operation for group in stage_operations(run, stage, shape) for operation in group
              if isinstance(operation, Product) and operation.name.endswith("head")]
             for stage in stage_layouts(run.model, run.parallel)]
    assert [len(own) for own in heads] == [0, 0, 0, 3 * (1 + depth)]


def test_recomputation_is_in_the_backward_and_beside_the_models_flops() -> None:
    run = preset("laptop").override(recompute_granularity="full")
    _, operations = _operations(run)
    again = [operation for operation in operations if operation.is_again]
    assert again and all(operation.part is WorkPart.INPUT for operation in again)
    plain = _operations(preset("laptop"))[1]
    assert len(operations) == len(plain) + len(again)


def test_tensor_parallelism_divides_the_products_of_attention_and_shared_experts() -> None:
    whole = preset("dsv3-16b")
    split = whole.override(tensor_model_parallel_size=2, expert_model_parallel_size=1)
    whole = whole.override(expert_model_parallel_size=1)

    def flops(run, name):
        return sum(o.flops for o in _operations(run)[1] if getattr(o, "name", "") == name and hasattr(o, "purpose"))

    for name in ("linear_proj", "shared_experts.linear_fc1", "head", "experts.linear_fc1", "linear_kv_down_proj"):
        assert flops(split, name) == pytest.approx(flops(whole, name) / 2), name


def _enumerated(experts: int, groups: int, kept: int, top: int, parts: int) -> float:
    """Mean number of parts among all choices of groups and of experts in them, all equally likely."""
    size, part, total, number = experts // groups, experts // parts, 0, 0
    for chosen_groups in itertools.combinations(range(groups), kept):
        within = [expert for expert in range(experts) if expert // size in chosen_groups]
        for chosen in itertools.combinations(within, top):
            total, number = total + len({expert // part for expert in chosen}), number + 1
    return total / number


@pytest.mark.parametrize(("groups", "kept", "top"), [(4, 2, 2), (4, 2, 3), (2, 1, 2), (1, 1, 3), (4, 4, 2), (4, 3, 4)])
@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_destinations_of_a_token_are_those_of_all_choices(groups: int, kept: int, top: int, parts: int) -> None:
    model = dataclasses.replace(preset("tiny").model, num_experts=8, moe_router_num_groups=groups,
                                moe_router_group_topk=kept, moe_router_topk=top)
    assert expected_destinations(model, parts) == pytest.approx(_enumerated(8, groups, kept, top, parts))


def test_bytes_of_a_token_are_those_of_the_report() -> None:
    """7,392 and 14,336 bytes for each destination, four nodes at most (dsv3 report, sections 2.1.2 and 3.2.2)."""
    run = preset("dsv3-671b")
    run = only_phase(run, main_phase(run)).override(fp8="blockwise")
    _, operations = _operations(run)
    sizes = {(operation.name, operation.row_bytes) for operation in operations if isinstance(operation, TokenExchange)}
    assert sizes == {("dispatch", 7392.0), ("combine", 14336.0)}
    network = Network(run.parallel, find_hardware("h800"), 2048, True)
    assert network.num_expert_nodes == 8
    nodes = expected_destinations(run.model, 8)
    assert 3.5 < nodes < 4
    traffic = network.exchange_traffic(run.model, 4096, 7392)
    assert traffic.network == pytest.approx(4096 * 7392 * nodes * 7 / 8)
    # DeepEP counts what stays on its node too: 51 GB/s.
    seconds = network.exchange_seconds(run.model, 4096, 7392)
    assert 4096 * 7392 * nodes / seconds == pytest.approx(51e9, rel=0.01)
    every = dataclasses.replace(network, sends_once_per_node=False).exchange_traffic(run.model, 4096, 7392)
    assert every.network == pytest.approx(4096 * 7392 * 8 * 7 / 8)


def test_experts_on_one_node_use_no_network() -> None:
    run = preset("dsv3-16b")
    network = Network(run.parallel, find_hardware("h800"), 8, True)
    traffic = network.exchange_traffic(run.model, 4096, 4096)
    assert traffic.network == 0 and traffic.nvlink > 0
    alone = Network(ParallelConfig(), find_hardware("h800"), 8, True)
    assert alone.exchange_seconds(run.model, 4096, 4096) == 0


def test_rings_share_the_cards_of_a_node() -> None:
    parallel = ParallelConfig(expert_model_parallel_size=8)
    network = Network(parallel, find_hardware("h800"), 64, True)
    # 64 dense replicas, eight on a node: NVLink bounds; experts' 8 replicas, one on a node: a card each.
    dense, experts = network.reduction_seconds(1e9, 0), network.reduction_seconds(0, 1e9)
    assert dense == pytest.approx(1e9 * 63 / 64 / 160e9, rel=0.01)
    assert experts == pytest.approx(1e9 * 7 / 8 / 40e9, rel=0.01)
