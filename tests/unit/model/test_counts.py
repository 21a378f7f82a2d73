"""The modules themselves, built without memory, have the parameters that the published model and our arithmetic say."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from dsv3_megatron.config.parallel import ParallelConfig
from dsv3_megatron.config.presets import PRESETS, preset
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.metrics.parameters import Component, count_parameters, rank_parameters
from dsv3_megatron.parallel.layout import stage_layouts

# Where the arithmetic's components are in the modules: (part, name) by the end of a parameter's name.
PLACES = [
    (r"word_embeddings\.weight", "embedding", "embedding"),
    (r"output_layer\.weight", "head", "head"),
    (r"linear_q_proj\.weight", "attention", "q_proj"),
    (r"linear_q_down_proj\.weight", "attention", "q_a_proj"),
    (r"linear_q_up_proj\.weight", "attention", "q_b_proj"),
    (r"linear_kv_down_proj\.weight", "attention", "kv_a_proj"),
    (r"linear_kv_up_proj\.weight", "attention", "kv_b_proj"),
    (r"linear_proj\.weight", "attention", "o_proj"),
    (r"router\.weight", "router", "router"),
    (r"\.experts\.linear_fc[12]\.weight", "routed_experts", "routed_experts"),
    (r"shared_experts\.linear_fc[12]\.weight", "shared_experts", "shared_experts"),
    (r"mlp\.linear_fc[12]\.weight", "dense_ffn", "dense_ffn"),
    (r"(input|pre_mlp|q|kv)_layernorm\.weight", "norms", "layer_norms"),
    (r"decoder\.final_layernorm\.weight", "final_norm", "final_norm"),
    (r"mtp\.layers\.\d+\.final_layernorm\.weight", "mtp", "final_norm"),
    (r"(enorm|hnorm)\.weight", "mtp", "input_norms"),
    (r"eh_proj\.weight", "mtp", "eh_proj"),
]


@pytest.fixture(scope="module")
def megatron_core() -> Iterator[None]:
    """Megatron-Core, importable without CUDA; the stand-ins are taken back unless they were there before."""
    from dsv3_megatron.platform import cpu, prepare

    was_installed = cpu.installed()
    prepare()
    yield
    if not was_installed:
        cpu.remove_stand_ins()


@contextlib.contextmanager
def one_of(world_size: int, rank: int, parallel: ParallelConfig) -> Iterator[Any]:
    """Groups of one rank of a run whose other ranks do not exist: torch's fake backend sends nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from dsv3_megatron.parallel.groups import create_groups, destroy_groups

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield create_groups(parallel, seed=1)
    finally:
        destroy_groups()


def build_without_memory(run: RunConfig, groups: Any) -> list[torch.nn.Module]:
    """One rank's stages on the meta device."""
    from dsv3_megatron.model.build import build_stages
    from dsv3_megatron.platform import meta_device

    with meta_device():
        return build_stages(run, groups, precision="bf16")[0]


@pytest.fixture
def build(megatron_core: None) -> Iterator[Callable[[RunConfig], torch.nn.Module]]:
    """Builds a run's model as one stage of one process, whatever the run's own layout."""
    with one_of(1, 0, ParallelConfig()) as groups:
        yield lambda run: build_without_memory(dataclasses.replace(run, parallel=ParallelConfig()), groups)[0]


def count_by_component(stage: torch.nn.Module) -> tuple[Counter[tuple[str, str]], Counter[tuple[str, str]]]:
    """Parameters of the main model and of the MTP modules, by part and name; a shared parameter counts once."""
    main: Counter[tuple[str, str]] = Counter()
    mtp: Counter[tuple[str, str]] = Counter()
    for name, parameter in stage.named_parameters():
        part, component = next((part, component) for end, part, component in PLACES if re.search(end + "$", name))
        (mtp if name.startswith("mtp.") else main)[part, component] += parameter.numel()
    return main, mtp


def as_counter(components: tuple[Component, ...]) -> Counter[tuple[str, str]]:
    return Counter({(component.part, component.name): component.total for component in components})


def test_dsv3_671b_has_exactly_the_published_parameters(build: Callable[[RunConfig], torch.nn.Module]) -> None:
    stage = build(preset("dsv3-671b"))
    main, mtp = count_by_component(stage)
    assert main.total() == 671_026_404_352
    assert mtp.total() == 11_610_067_968
    assert {parameter.device.type for parameter in stage.parameters()} == {"meta"}
    assert {buffer.device.type for buffer in stage.buffers()} == {"meta"}
    assert all(parameter.dtype == torch.bfloat16 for parameter in stage.parameters())
    # 58 MoE layers and the MTP module's; the bias is no parameter
    biases = [buffer for name, buffer in stage.named_buffers() if name.endswith("expert_bias")]
    assert [tuple(bias.shape) for bias in biases] == [(256,)] * 59
    assert {bias.dtype for bias in biases} == {torch.float32}


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_component_of_a_preset(name: str, build: Callable[[RunConfig], torch.nn.Module]) -> None:
    run = preset(name)
    main, mtp = count_by_component(build(run))
    table = count_parameters(run.model)
    assert main == as_counter(table.main)
    assert mtp == as_counter(table.mtp)


@pytest.mark.parametrize("changes", [
    {"mtp_num_layers": 0}, {"mtp_num_layers": 3}, {"num_shared_experts": 0}, {"num_shared_experts": 3},
    {"q_lora_rank": None}, {"num_dense_layers": 0}, {"num_dense_layers": 4}, {"num_layers": 2, "num_dense_layers": 1},
    {"moe_router_num_groups": 1, "moe_router_group_topk": 1}, {"v_head_dim": 48},
], ids=str)
def test_every_component_of_a_variant(changes: dict[str, Any], build: Callable[[RunConfig], torch.nn.Module]) -> None:
    run = preset("tiny").override(**changes)
    run.validate()
    main, mtp = count_by_component(build(run))
    table = count_parameters(run.model)
    assert main == as_counter(table.main)
    assert mtp == as_counter(table.mtp)


def test_the_mtp_module_shares_embedding_and_head(build: Callable[[RunConfig], torch.nn.Module]) -> None:
    stage = build(preset("tiny"))
    rows = preset("tiny").model.vocab_size
    tables = [name for name, parameter in stage.named_parameters() if rows in parameter.shape]
    assert tables == ["embedding.word_embeddings.weight", "output_layer.weight"]
    (memory,) = rank_parameters(preset("tiny"), stage_layouts(preset("tiny").model, ParallelConfig()))
    assert memory.parameters == sum(parameter.numel() for parameter in stage.parameters())


# -- the part of each rank -----------------------------------------------------------------------------


@pytest.mark.parametrize(("world_size", "degrees"), [
    (4, {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}),
    (4, {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 4}),
    (4, {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    (2, {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}),
    (4, {"pipeline_model_parallel_size": 2, "pipeline_schedule": "dualpipev", "global_batch_size": 32}),
    (4, {"pipeline_model_parallel_size": 4, "pipeline_schedule": "dualpipe", "global_batch_size": 32}),
    (4, {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "Et|tttmL"}),
    # The MTP modules in front of the stage of the loss: with a copy of the embedding, with the embedding itself.
    (4, {"pipeline_model_parallel_size": 4, "pipeline_model_parallel_layout": "Ett|tt|m|L"}),
    (2, {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "Ettttmm|L", "mtp_num_layers": 2}),
    (2, {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2,
         "pipeline_model_parallel_layout": "Ett|tt|m|L"}),
    (2, {"pipeline_model_parallel_size": 2, "pipeline_schedule": "zbv",
         "pipeline_model_parallel_layout": "Ett|t|tm|L"}),
    (4, {"pipeline_model_parallel_size": 4, "pipeline_schedule": "dualpipe", "global_batch_size": 32,
         "pipeline_model_parallel_layout": "Ett|tt|m|L"}),
], ids=str)
def test_a_rank_holds_what_the_table_of_bytes_says(world_size: int, degrees: dict[str, Any],
                                                   megatron_core: None) -> None:
    run = preset("tiny").override(**degrees)
    run.validate(world_size)
    table = rank_parameters(run, stage_layouts(run.model, run.parallel))
    for rank in range(world_size):
        with one_of(world_size, rank, run.parallel) as groups:
            stages = build_without_memory(run, groups)
            memory = table[groups.pp.rank()]
        assert sum(parameter.numel() for stage in stages for parameter in stage.parameters()) == memory.parameters


@pytest.mark.parametrize("rank", [0, 1000, 2047])
def test_a_rank_of_the_671b_run_on_2048_gpus(rank: int, megatron_core: None) -> None:
    run = preset("dsv3-671b")
    with one_of(2048, rank, run.parallel) as groups:
        stages = build_without_memory(run, groups)
        memory = rank_parameters(run, stage_layouts(run.model, run.parallel))[groups.pp.rank()]
    assert len(stages) == 2, "DualPipe holds a stage of each copy"
    assert sum(parameter.numel() for stage in stages for parameter in stage.parameters()) == memory.parameters
    experts = [parameter for stage in stages for name, parameter in stage.named_parameters()
               if "experts.linear_fc1" in name]
    assert {parameter.shape[0] for parameter in experts if parameter.ndim == 3} == {4}
