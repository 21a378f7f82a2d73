"""Operations against the FLOPs of metrics/flops.py, and bytes on the wire against enumeration and the report."""

from __future__ import annotations

import dataclasses

import pytest

from dsv3_megatron.config.parallel import ParallelConfig
from dsv3_megatron.config.presets import preset
from dsv3_megatron.metrics.flops import flops_per_token
from dsv3_megatron.parallel.layout import stage_layouts
from dsv3_megatron.planning.run_cost import main_phase, only_phase
from dsv3_megatron.planning.time.layer_operations import stage_operations
from dsv3_megatron.planning.time.operations import (
    LatentRing,
    Product,
    SequenceExchange,
    Shape,
    WorkPart,
    model_flops,
)
from tests.unit.planning.time.setting import operations_of

HEADS = ("head", "mtp 1 head")


@pytest.mark.parametrize("name", ["tiny", "laptop", "dsv3-16b", "dsv3-671b"])
@pytest.mark.parametrize("changes", [
    {}, {"fp8": "blockwise"}, {"recompute_granularity": "selective"}, {"recompute_granularity": "full"}])
def test_operations_add_up_to_the_models_flops(name: str, changes) -> None:
    run = preset(name)
    run = only_phase(run, main_phase(run)).override(**changes)
    run = dataclasses.replace(run, parallel=ParallelConfig(pipeline_model_parallel_size=2))
    shape, operations = operations_of(run)
    expected = flops_per_token(run.model, run.training.seq_length).training * shape.tokens
    assert model_flops(operations) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("way", ["p2p", "all_gather", "a2a"])
@pytest.mark.parametrize("recompute", [None, "selective"])
def test_ranks_that_share_a_sequence_do_as_much_together_as_one(way: str, recompute: str | None) -> None:
    run = dataclasses.replace(only_phase(preset("tiny"), main_phase(preset("tiny"))).override(
        recompute_granularity=recompute), parallel=ParallelConfig(context_parallel_size=4, cp_comm_type=way))
    shape, operations = operations_of(run)
    assert shape.tokens == run.training.micro_batch_size * run.training.seq_length / 4
    expected = flops_per_token(run.model, run.training.seq_length).training * shape.tokens
    assert model_flops(operations) == pytest.approx(expected, rel=1e-12)


def test_a_ring_makes_keys_and_values_of_every_block_forward_and_backward() -> None:
    """Rank 0, whose late tokens see everything, expands 4 blocks of as many tokens as it has, and again in backward."""
    run = only_phase(preset("dsv3-671b"), main_phase(preset("dsv3-671b"))).override(fp8="none")
    run = dataclasses.replace(run, parallel=ParallelConfig(context_parallel_size=4))
    layers = run.model.num_layers + run.model.mtp_num_layers
    shape, operations = operations_of(run)
    own = [operation for operation in operations if getattr(operation, "name", "") == "linear_kv_up_proj"]
    assert [sum(isinstance(o, Product) and o.part is part for o in own) for part in WorkPart] == [
        4 * layers, 3 * 4 * layers, 0], "weight gradients do not wait"
    assert {o.rows for o in own if o.purpose == "fprop"} == {shape.tokens}
    rings = [operation for operation in operations if isinstance(operation, LatentRing)]
    # 512 + 64 numbers of each token, in bf16; backward their gradients in fp32 beside them.
    assert [(ring.steps, ring.num_bytes) for ring in rings] == [
        (3, shape.tokens * 576 * 2), (3, shape.tokens * 576 * (2 + 4))] * layers


@pytest.mark.parametrize("way", ["p2p", "all_gather"])
def test_latents_in_fp8_are_656_bytes_of_a_token(way: str) -> None:
    """512 numbers of a byte, 4 scales and 64 numbers in bf16; gradients in fp32 as without it."""
    run = only_phase(preset("dsv3-671b"), main_phase(preset("dsv3-671b")))
    run = dataclasses.replace(run, parallel=ParallelConfig(context_parallel_size=4, cp_comm_type=way,
                                                           cp_fp8_latents=True))
    shape, operations = operations_of(run)
    rings = {(ring.part, ring.num_bytes / shape.tokens) for ring in operations if isinstance(ring, LatentRing)}
    gathered = {each.num_bytes / shape.tokens for each in operations
                if isinstance(each, SequenceExchange) and each.name == "latents of all ranks"}
    if way == "p2p":
        assert (rings, gathered) == ({(WorkPart.FORWARD, 656), (WorkPart.INPUT, 656 + 576 * 4)}, set())
    else:
        assert (rings, gathered) == ({(WorkPart.INPUT, 576 * 4)}, {3 * 656})


@pytest.mark.parametrize("depth", [1, 2])
def test_heads_are_where_the_losses_are(depth: int) -> None:
    """Not where the MTP modules are; all stages together do as much as in any other layout."""
    run = preset("tiny").override(mtp_num_layers=depth)
    modules = "m" * depth
    run = dataclasses.replace(run, parallel=ParallelConfig(
        pipeline_model_parallel_size=4, pipeline_model_parallel_layout=f"Ett|tt|{modules}|L"))
    shape, operations = operations_of(run)
    expected = flops_per_token(run.model, run.training.seq_length).training * shape.tokens
    assert model_flops(operations) == pytest.approx(expected, rel=1e-12)
    heads = [[operation for group in stage_operations(run, stage, shape) for operation in group
              if isinstance(operation, Product) and operation.name.endswith("head") and not operation.is_again]
             for stage in stage_layouts(run.model, run.parallel)]
    assert [len(own) for own in heads] == [0, 0, 0, 3 * (1 + depth)]


def test_recomputation_is_in_the_backward_and_beside_the_models_flops() -> None:
    run = preset("laptop").override(recompute_granularity="full")
    _, operations = operations_of(run)
    again = [operation for operation in operations if operation.is_again and operation.name not in HEADS]
    assert again and all(operation.part is WorkPart.INPUT for operation in again)
    plain = operations_of(preset("laptop"))[1]
    assert len(operations) == len(plain) + len(again)


def test_a_fused_head_makes_its_logits_twice_and_its_weight_gradient_at_once() -> None:
    """As ops/fused_head_loss.py does on a GPU: of bytes, nothing beside the products but sums of tiles and tokens."""
    run = dataclasses.replace(preset("dsv3-671b"), parallel=ParallelConfig(
        pipeline_model_parallel_size=16, pipeline_schedule="zb1p"))
    shape, operations = operations_of(run)
    for name in HEADS:
        own = [operation for operation in operations if operation.name == name]
        assert [(o.part, o.purpose, o.is_again) for o in own] == [
            (WorkPart.FORWARD, "fprop", False), (WorkPart.INPUT, "dgrad", False), (WorkPart.INPUT, "wgrad", False),
            (WorkPart.INPUT, "fprop", True)]
        losses = [operation for operation in operations if operation.name == f"{name} loss"]
        moved = sum(operation.num_bytes for operation in losses) / (shape.tokens * run.model.vocab_size)
        assert moved == pytest.approx(16 / 256 + (15 * 4 + 6) * 7168 / 129280, rel=1e-3)
    on_cpu = Shape.of(run, is_cpu=True)
    (stage,) = [stage for stage in stage_layouts(run.model, run.parallel) if stage.has_loss]
    chunked = [operation for group in stage_operations(run, stage, on_cpu) for operation in group
               if operation.name == "head loss"]
    assert [operation.num_bytes / (shape.tokens * run.model.vocab_size) for operation in chunked] in (
        [16, 8, 8], [34, 12, 12])  # in fp32 or bf16


def test_tensor_parallelism_divides_the_products_of_attention_and_shared_experts() -> None:
    whole = preset("dsv3-16b")
    split = whole.override(tensor_model_parallel_size=2, expert_model_parallel_size=1)
    whole = whole.override(expert_model_parallel_size=1)

    def flops(run, name):
        return sum(o.flops for o in operations_of(run)[1] if getattr(o, "name", "") == name and hasattr(o, "purpose"))

    for name in ("linear_proj", "shared_experts.linear_fc1", "head", "experts.linear_fc1", "linear_kv_down_proj"):
        assert flops(split, name) == pytest.approx(flops(whole, name) / 2), name
