"""The table of weights against the modules, built without memory, and against the published checkpoint's inventory."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import pytest

from dsv3_megatron.certification.reference_weights import weight_shapes
from dsv3_megatron.checkpoint.hf.names import hugging_face_tensors
from dsv3_megatron.checkpoint.hf.weight_files import plan_shards
from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.config.parallel import ParallelConfig
from dsv3_megatron.config.precision import Fp8Config, precision_map
from dsv3_megatron.config.presets import PRESETS, preset
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.config.weights import (
    COMPONENTS,
    WEIGHTS,
    Fp8,
    Place,
    Split,
    Weight,
    each_expert,
    field,
    find_weight,
    model_shapes,
    sections,
)
from dsv3_megatron.metrics.flops import flops_per_token
from dsv3_megatron.metrics.parameters import count_parameters, rank_parameters
from dsv3_megatron.metrics.rank_state import rank_states
from dsv3_megatron.parallel.layout import stage_layouts
from dsv3_megatron.planning.time.layer_operations import stage_operations
from dsv3_megatron.planning.time.operations import Shape, model_flops
from dsv3_megatron.reports.model_table import model_table
from tests.unit.model.test_counts import build_without_memory, megatron_core, one_of

__all__ = ["megatron_core"]  # a fixture

ROWS = [weight for rows in WEIGHTS.values() for weight in rows]
# Each embedding and head are weights of their own: no model of this library ties them.
VARIANTS: list[dict[str, Any]] = [
    {}, {"q_lora_rank": None}, {"mtp_num_layers": 0}, {"mtp_num_layers": 3}, {"num_shared_experts": 0},
    {"num_shared_experts": 3}, {"num_dense_layers": 0}, {"num_dense_layers": 4}, {"v_head_dim": 48},
]
SPLITS: list[dict[str, Any]] = [
    {}, {"tensor_model_parallel_size": 2}, {"expert_model_parallel_size": 4},
    {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2},
    {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "q_lora_rank": None, "num_shared_experts": 2},
    {"tensor_model_parallel_size": 4, "expert_tensor_parallel_size": 2, "mtp_num_layers": 2},
    {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_the_modules_have_the_table_s_weights_and_no_others(changes: dict[str, Any], megatron_core: None) -> None:
    from dsv3_megatron.model.global_names import whole_parameters

    run = preset("tiny").override(**changes)
    with one_of(1, 0, ParallelConfig()) as groups:
        (stage,) = build_without_memory(run, groups)
        built = {whole.name: whole.shape for whole in whole_parameters(stage, groups)}
        built |= {name: tuple(buffer.shape) for name, buffer in stage.named_buffers() if name.endswith("expert_bias")}
    assert model_shapes(run.model) == built
    assert {name for name in built if not find_weight(name).is_trained} == {
        name for name in built if name.endswith("expert_bias")}


@pytest.mark.parametrize("changes", SPLITS, ids=str)
def test_a_rank_holds_what_the_table_s_split_says(changes: dict[str, Any], megatron_core: None) -> None:
    from dsv3_megatron.model.global_names import global_name

    run = preset("tiny").override(**changes)
    model, parallel = run.model, run.parallel
    world_size = parallel.minimum_world_size
    found: set[str] = set()
    for rank in range(world_size):
        with one_of(world_size, rank, parallel) as groups:
            (stage,) = build_without_memory(run, groups)
        for path, parameter in stage.named_parameters():
            name = global_name(path, stage)
            weight = find_weight(name)
            local = weight.local_shape(model, parallel)
            if weight.is_expert:
                local = (model.num_experts // parallel.expert_model_parallel_size, *local)
            assert tuple(parameter.shape) == local, name
            assert parameter.numel() == weight.local_numel(model, parallel), name
            # What Megatron-Core notes on the parameter: the axis that is split, of an expert's behind the experts'.
            axis = {Split.REPLICATED: None, Split.COLUMN: 0, Split.ROW: 1}[weight.split]
            noted = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None
            assert noted == (axis if axis is None else axis + weight.is_expert), name
            found.add(name)
    assert found == {re.sub(r"\.experts\.\d+\.", ".experts.", name) for name in model_shapes(model)
                     if find_weight(name).is_trained}


@pytest.mark.parametrize("model", [
    *(preset(name).model for name in sorted(PRESETS)),
    *(dataclasses.replace(preset("tiny").model, **changes) for changes in VARIANTS),
], ids=lambda model: f"{model.hidden_size}-{model.num_layers}")
def test_the_parts_are_the_published_tensors(model: ModelConfig) -> None:
    """Names and shapes of the tests' own list, in which the copies that MTP modules store are left out."""
    listed: dict[str, tuple[int, ...]] = {}
    copies = []
    for section in sections(model):
        copies += [section.theirs + weight.copied_as for weight in section.copies]
        for weight, expert in each_expert(section.weights, model):
            listed |= {section.theirs + part.format(expert=expert): weight.part_shape(model) for part in weight.parts}
    assert listed == weight_shapes(model)
    assert copies == [f"model.layers.{layer}.{name}" for layer in range(
        model.num_layers, model.num_layers + model.mtp_num_layers)
        for name in ("embed_tokens.weight", "shared_head.head.weight")]


def test_a_width_s_text_is_its_value() -> None:
    for model in (preset("dsv3-671b").model, preset("dsv3-16b").model):
        for weight in ROWS:
            for width in weight.widths:
                if "q_lora_rank" not in width.text or model.q_lora_rank:
                    assert eval(width.text, vars(model)) == width.of(model), width.text


def test_the_published_checkpoint_has_these_in_fp8() -> None:
    """Source: DeepSeek's README_WEIGHTS and the dtypes of the published files."""
    stored = {part.split(".")[-2] for weight in ROWS if weight.fp8 is Fp8.AS_PUBLISHED for part in weight.parts}
    assert stored == {"q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj",
                      "up_proj", "down_proj"}
    assert [weight.name for weight in ROWS if weight.fp8 is Fp8.ON_REQUEST] == ["eh_proj.weight"]


def test_local_parts_are_of_whole_elements() -> None:
    model, parallel = preset("dsv3-671b").model, ParallelConfig(
        tensor_model_parallel_size=4, expert_model_parallel_size=64, expert_tensor_parallel_size=2)
    up = find_weight("decoder.layers.60.self_attention.linear_q_up_proj.weight")
    assert (up.shape(model), up.local_shape(model, parallel)) == ((24576, 1536), (6144, 1536))
    gate_up = find_weight("mtp.layers.0.mtp_model_layer.mlp.experts.255.linear_fc1.weight")
    assert (gate_up.shape(model), gate_up.local_shape(model, parallel)) == ((4096, 7168), (2048, 7168))
    assert gate_up.local_numel(model, parallel) == 4 * 2048 * 7168
    down = find_weight("mtp.layers.0.mtp_model_layer.mlp.experts.linear_fc2.weight")
    assert down.local_shape(model, parallel) == (7168, 1024) and down.numel(model) == math.prod((7168, 2048))


@pytest.mark.parametrize("name", ["decoder.layers.3.self_attention.linear_x_proj.weight", "mtp.layers.0.x", "x"])
def test_a_weight_without_a_row_is_named(name: str) -> None:
    with pytest.raises(AssertionError, match=rf"weight {name} has 0 rows in dsv3_megatron.config.weights"):
        find_weight(name)


@pytest.mark.parametrize("columns", [
    {"component": "attentive"}, {"split": Split.ROW}, {"fp8": Fp8.AS_PUBLISHED}], ids=str)
def test_a_row_that_cannot_be_is_refused(columns: dict[str, Any]) -> None:
    (norm,) = WEIGHTS[Place.AFTER_LAYERS]
    with pytest.raises(AssertionError, match=r"decoder\.final_layernorm\.weight: "):
        dataclasses.replace(norm, **columns)


def test_every_component_has_a_weight() -> None:
    assert {weight.component for weight in ROWS} == set(COMPONENTS)
    assert len({(place, weight.name) for place, rows in WEIGHTS.items() for weight in rows}) == len(ROWS)
    assert all(isinstance(weight, Weight) for weight in ROWS)


# -- a fresh weight is one row and one module --------------------------------------------------------------------

GATE = Weight("self_attention.linear_gate_proj.weight", (field("num_attention_heads") * field("v_head_dim"),
                                                         field("hidden_size")),
              ("self_attn.g_proj.weight",), "attention", "g_proj", Split.COLUMN, Fp8.AS_PUBLISHED)


@pytest.fixture
def gated(monkeypatch: pytest.MonkeyPatch, megatron_core: None) -> RunConfig:
    """A run whose attention multiplies what the heads read by a gate, a matrix that this library does not have."""
    from dsv3_megatron.model import specs
    from dsv3_megatron.model.attention import LocalMLASelfAttention
    from dsv3_megatron.model.linear import LocalColumnParallelLinear

    class GatedAttention(LocalMLASelfAttention):
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            self.linear_gate_proj = LocalColumnParallelLinear(
                config.hidden_size, config.num_attention_heads * config.v_head_dim, config=config,
                init_method=config.init_method, bias=False, gather_output=False, skip_bias_add=True,
                tp_group=self.tp_group)

    monkeypatch.setattr(specs, "LocalMLASelfAttention", GatedAttention)
    monkeypatch.setitem(WEIGHTS, Place.ATTENTION, (*WEIGHTS[Place.ATTENTION], GATE))
    # Answers are remembered by model: this one has a norm that no other test's has.
    return preset("tiny").override(layernorm_epsilon=1.0625e-6)


def test_a_fresh_weight_is_one_row_and_one_module(gated: RunConfig) -> None:
    """Counts, bytes, shares of ranks, names, FP8, FLOPs and plans know it, with nothing else changed."""
    from dsv3_megatron.metrics.gradients import component_of
    from dsv3_megatron.model.global_names import whole_parameters

    model = gated.model
    numel, layers = 4 * 32 * 128, 4 + 1  # one of them an MTP module's
    # Those of `tiny`, by tests/unit/metrics/test_rank_state.py; and tensors of five layers, four of them with experts.
    assert count_parameters(model).total == 1_876_480 + 417_504 + numel * layers
    assert len(hugging_face_tensors(model)) == 3 + 5 * 9 + 3 + 4 * (2 + 9 * 3) + 6 + layers
    table = model_table(gated, 1, stage_layouts(model, gated.parallel))
    assert re.search(r"^attention g_proj +16,384 +4 +4 +65,536 +65,536$", table, re.MULTILINE), table

    with one_of(2, 1, ParallelConfig(tensor_model_parallel_size=2)) as groups:
        split = gated.override(tensor_model_parallel_size=2)
        (stage,) = build_without_memory(split, groups)
        shapes = {whole.name: (whole.shape, tuple(whole.local.shape)) for whole in whole_parameters(stage, groups)}
        held = sum(parameter.numel() for parameter in stage.parameters())
    name = "decoder.layers.0.self_attention.linear_gate_proj.weight"
    assert shapes[name] == ((128, 128), (64, 128)) and component_of(name) == "attention"
    (state,) = rank_states(split, 2, precision="bf16")
    (parameters,) = rank_parameters(split, stage_layouts(model, split.parallel))
    assert state.parameters == parameters.parameters == held

    tensors = {tensor.name: tensor for tensor in hugging_face_tensors(model)}
    theirs = "model.layers.4.self_attn.g_proj.weight"  # of the MTP module
    assert tensors[theirs].shape == (128, 128)
    assert tensors[theirs].parameter == "mtp.layers.0.mtp_model_layer.self_attention.linear_gate_proj.weight"
    assert theirs + "_scale_inv" in {entry.name for shard in plan_shards(model, "fp8") for entry in shard.entries}
    assert precision_map(Fp8Config(fp8="blockwise"), model)[name.removesuffix(".weight")].is_fp8

    flops = flops_per_token(model, 256)
    assert flops.mtp_linear == 6 * (417_504 + numel + 2048 * 128 - 6 * 3 * 96 * 128)  # two of eight experts
    shape = Shape.of(gated)
    operations = [operation for stage in stage_layouts(model, gated.parallel)
                  for group in stage_operations(gated, stage, shape) for operation in group]
    assert model_flops(operations) == pytest.approx(flops.training * shape.tokens, rel=1e-12)


def test_a_module_without_a_row_is_named(gated: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from dsv3_megatron.model.global_names import whole_parameters

    monkeypatch.setitem(WEIGHTS, Place.ATTENTION, WEIGHTS[Place.ATTENTION][:-1])
    with one_of(1, 0, ParallelConfig()) as groups:
        (stage,) = build_without_memory(gated, groups)
        with pytest.raises(AssertionError, match=r"linear_gate_proj\.weight has 0 rows"):
            list(whole_parameters(stage, groups))
