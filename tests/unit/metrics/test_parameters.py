"""Parameter counts and bytes per rank against the published model and against each other."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.config.presets import PRESETS, preset
from dsv3_megatron.metrics.parameters import ParameterTable, count_parameters, rank_parameters, stage_components
from dsv3_megatron.metrics.rank_state import rank_states
from dsv3_megatron.parallel.layout import StageLayout, stage_layouts


@pytest.fixture(scope="module")
def table() -> ParameterTable:
    return count_parameters(preset("dsv3-671b").model)


# DeepSeek-V3 report, section 2, and its config.json: per unit, units, total
DSV3_LINES = [
    ("embedding", 926_679_040, 1, 926_679_040),
    ("q_a_proj", 11_010_048, 61, 671_612_928),
    ("q_b_proj", 37_748_736, 61, 2_302_672_896),
    ("kv_a_proj", 4_128_768, 61, 251_854_848),
    ("kv_b_proj", 16_777_216, 61, 1_023_410_176),
    ("o_proj", 117_440_512, 61, 7_163_871_232),
    ("dense_ffn", 396_361_728, 3, 1_189_085_184),
    ("router", 1_835_008, 58, 106_430_464),
    ("routed_experts", 44_040_192, 58 * 256, 653_908_770_816),
    ("shared_experts", 44_040_192, 58, 2_554_331_136),
    ("layer_norms", 16_384, 61, 999_424),
    ("final_norm", 7_168, 1, 7_168),
    ("head", 926_679_040, 1, 926_679_040),
]


@pytest.mark.parametrize(("name", "per_unit", "units", "total"), DSV3_LINES)
def test_dsv3_671b_component(table: ParameterTable, name: str, per_unit: int, units: int, total: int) -> None:
    (component,) = [c for c in table.main if c.name == name]
    assert (component.parameters_per_unit, component.num_units, component.total) == (per_unit, units, total)


def test_dsv3_671b_has_no_other_component(table: ParameterTable) -> None:
    assert [c.name for c in table.main] == [line[0] for line in DSV3_LINES]


def test_dsv3_671b_totals(table: ParameterTable) -> None:
    assert table.parts()["attention"] == 11_413_422_080
    assert sum(c.parameters_per_unit for c in table.main if c.part == "attention") == 187_105_280
    assert table.parts()["embedding"] + table.parts()["head"] == 1_853_358_080
    assert table.main_total == 671_026_404_352
    assert table.main_active == 37_552_282_624
    assert table.main_active_without_embedding == 36_625_603_584


def test_dsv3_671b_mtp(table: ParameterTable) -> None:
    assert table.mtp_total == 11_610_067_968
    (eh_proj,) = [c for c in table.mtp if c.name == "eh_proj"]
    assert eh_proj.total == 102_760_448
    # the 11.5B unique and 2.4B active of DeepSeek's README_WEIGHTS leave eh_proj out; the latter has both tables
    assert round((table.mtp_total - eh_proj.total) / 1e9, 3) == 11.507
    copies = 2 * 926_679_040
    assert round((table.mtp_active - eh_proj.total + copies) / 1e9, 3) == 2.439
    # with its copies of embedding and head: the "14B", and the "685B" in all
    assert round((table.mtp_total + copies) / 1e9, 3) == 13.463
    assert round((table.total + copies) / 1e9, 2) == 684.49


def test_full_rank_queries_have_one_projection_and_no_query_norm() -> None:
    model = dataclasses.replace(preset("dsv3-16b").model, mtp_num_layers=0)
    table = count_parameters(model)
    names = {c.name: c for c in table.main}
    assert "q_a_proj" not in names and "q_b_proj" not in names
    assert names["q_proj"].parameters_per_unit == 2048 * 16 * 192
    assert names["layer_norms"].parameters_per_unit == 2 * 2048 + 512
    assert table.mtp == () and table.mtp_total == 0


def test_deepseek_v2_lite_is_15_7_billion() -> None:
    """The 16B preset with V2-Lite's vocabulary of 102,400 is V2-Lite: 15.7B in all (V2 report, appendix B)."""
    model = dataclasses.replace(preset("dsv3-16b").model, vocab_size=102_400)
    table = count_parameters(model)
    assert table.main_total == 15_706_484_224
    assert round(table.main_active_without_embedding / 1e9, 1) == 2.5


def test_moonlight_has_the_numbers_of_its_report() -> None:
    """15.29B, of which a token uses 2.24B, both without embeddings (Muon is Scalable for LLM Training, table 3)."""
    model = preset("moonlight-16b").model
    table = count_parameters(model)
    embedding = model.vocab_size * model.hidden_size
    assert table.main_total == 15_960_108_544 and table.mtp_total == 0
    assert round((table.main_total - 2 * embedding) / 1e9, 2) == 15.29
    assert round((table.main_active_without_embedding - embedding) / 1e9, 2) == 2.24


def test_kimi_k2_has_a_trillion_parameters() -> None:
    """"1T" and "32B" of its README; a token uses 31.7B without the table that it is looked up in."""
    table = count_parameters(preset("kimi-k2").model)
    assert table.main_total == 1_026_408_209_408
    assert round(table.main_active_without_embedding / 1e9) == 32


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_mtp_modules_are_equal(depth: int) -> None:
    model = dataclasses.replace(preset("dsv3-671b").model, mtp_num_layers=depth)
    assert count_parameters(model).mtp_total == depth * 11_610_067_968


def test_dsv3_671b_bytes_of_a_middle_rank() -> None:
    """Four MoE layers, four experts of each, under a schedule with one copy of the model: counted by hand."""
    run = preset("dsv3-671b").override(pipeline_schedule="1f1b")
    memory = rank_parameters(run, stage_layouts(run.model, run.parallel))[5]
    state = rank_states(run, 2048, precision="bf16")[5]
    assert len(memory.layer_ids) == 4
    assert memory.dense_parameters == 4 * (187_105_280 + 1_835_008 + 44_040_192 + 16_384)
    assert memory.expert_parameters == 4 * 4 * 44_040_192
    # The dense parameters are a multiple of 128 ranks x 128 elements but for 1.4e6 of them, the experts' of all.
    padded = -(-memory.dense_parameters // 128) * 128 + memory.expert_parameters
    assert state.parameter_bytes == 2 * padded
    assert state.gradient_bytes == 4 * padded
    # 128 data-parallel ranks share the dense states, 2 expert-data-parallel ranks the experts'
    owned = memory.dense_parameters // 128 + memory.expert_parameters // 2
    # fp32 master weights and two bf16 moments; for each of two flat buffers five blocks of scratch; in CPU memory an
    # fp32 average
    assert (state.optimizer_bytes, state.average_bytes) == (8 * owned + 2 * 5 * 4 * 2 ** 17, 4 * owned)
    assert state.total_bytes == state.parameter_bytes + state.gradient_bytes + state.optimizer_bytes


def test_fp32_weights_are_their_own_master() -> None:
    run = preset("tiny").override(precision="fp32")
    (state,) = rank_states(run, 1, precision="fp32")
    count = count_parameters(run.model).total
    padding = state.gradient_bytes - 4 * count  # norms of 32 and 96 weights, each to 64; the end to 128
    assert 0 < padding < 4 * (64 * 20 + 128)
    assert (state.parameter_bytes, state.optimizer_bytes) == (4 * count + padding, 8 * count)
    assert state.average_bytes == 0
    (state,) = rank_states(run.override(exp_avg_sq_dtype="bf16"), 1, precision="fp32")
    assert state.optimizer_bytes == 6 * count + 5 * 4 * 2 ** 17


def test_mtp_stage_without_embedding_holds_a_copy() -> None:
    model = preset("tiny").model
    table_size = model.vocab_size * model.hidden_size
    alone = StageLayout(stage=0, layer_ids=(0, 1, 2, 3), has_embedding=True, mtp_layer_ids=(0,), has_loss=True)
    first = StageLayout(stage=0, layer_ids=(0, 1), has_embedding=True, mtp_layer_ids=(), has_loss=False)
    last = StageLayout(stage=1, layer_ids=(2, 3), has_embedding=False, mtp_layer_ids=(0,), has_loss=True)

    def size(stage: StageLayout) -> int:
        return sum(c.total for c in stage_components(model, stage))

    assert size(alone) == count_parameters(model).total
    assert size(first) + size(last) == count_parameters(model).total + table_size


def test_mtp_stage_before_the_loss_holds_no_head() -> None:
    model = preset("tiny").model
    parallel = preset("tiny").override(pipeline_model_parallel_size=4,
                                       pipeline_model_parallel_layout="Ett|tt|m|L").parallel
    table_size = model.vocab_size * model.hidden_size
    sizes = [sum(c.total for c in stage_components(model, stage)) for stage in stage_layouts(model, parallel)]
    assert sizes[3] == table_size
    assert sizes[2] == table_size + count_parameters(model).mtp_total
    assert sum(sizes) == count_parameters(model).total + table_size


def test_tensor_parallelism_splits_projections_and_not_norms() -> None:
    run = preset("tiny").override(tensor_model_parallel_size=2, expert_tensor_parallel_size=2)
    (whole,) = rank_parameters(preset("tiny"), stage_layouts(run.model, run.parallel))
    (half,) = rank_parameters(run, stage_layouts(run.model, run.parallel))
    replicated = 5 * (128 * 64 + 128 * 48 + 352) + 4 * 1024 + 128 + 3 * 128  # down-projections, norms, routers
    assert half.expert_parameters == whole.expert_parameters // 2
    assert half.dense_parameters == replicated + (whole.dense_parameters - replicated) // 2


def test_chunks_of_one_pipeline_rank_add_up() -> None:
    run = preset("tiny").override(pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=2)
    stages = stage_layouts(run.model, run.parallel)
    ranks = rank_parameters(run, stages)
    assert [memory.stages for memory in ranks] == [(0, 2), (1, 3)]
    assert [memory.layer_ids for memory in ranks] == [(0, 2), (1, 3)]


@pytest.mark.parametrize(("schedule", "stages"), [("zbv", [(0, 3), (1, 2)]), ("dualpipe", [(0, 1), (0, 1)])])
def test_a_folded_pipeline_has_one_embedding_on_its_first_rank(schedule: str, stages: list[tuple[int, int]]) -> None:
    run = preset("tiny").override(pipeline_model_parallel_size=2, pipeline_schedule=schedule)
    ranks = rank_parameters(run, stage_layouts(run.model, run.parallel))
    assert [memory.stages for memory in ranks] == stages
    copies = run.parallel.num_model_copies
    assert sum(memory.parameters for memory in ranks) == copies * count_parameters(run.model).total
    # ZeRO-1 over both copies: the states are there once.
    states = rank_states(run, 2, precision="bf16")
    padding = sum(state.parameter_bytes for state in states) // 2 - copies * count_parameters(run.model).total
    excess = sum(state.optimizer_bytes for state in states) - 12 * count_parameters(run.model).total
    assert 0 <= excess <= 12 * padding < 1e-3 * 12 * count_parameters(run.model).total


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    num_layers = draw(st.integers(2, 12))
    return ModelConfig(
        num_layers=num_layers, num_dense_layers=draw(st.integers(0, num_layers)), hidden_size=draw(st.integers(1, 64)),
        num_attention_heads=draw(st.integers(1, 8)), q_lora_rank=draw(st.none() | st.integers(1, 32)),
        kv_lora_rank=draw(st.integers(1, 32)), qk_nope_head_dim=draw(st.integers(1, 16)),
        qk_rope_head_dim=2 * draw(st.integers(1, 8)), v_head_dim=draw(st.integers(1, 16)),
        ffn_hidden_size=draw(st.integers(1, 99)), num_experts=draw(st.sampled_from([4, 8])),
        moe_ffn_hidden_size=draw(st.integers(1, 33)), moe_router_topk=draw(st.integers(1, 4)),
        num_shared_experts=draw(st.integers(0, 3)), mtp_num_layers=draw(st.integers(0, 3)),
        vocab_size=draw(st.integers(1, 500)))


@settings(max_examples=60)
@given(model=models(), pipeline=st.integers(1, 3), experts=st.sampled_from([1, 2, 4]))
def test_ranks_hold_the_model_once_and_the_copies(model: ModelConfig, pipeline: int, experts: int) -> None:
    pipeline = min(pipeline, model.num_layers)
    run = dataclasses.replace(preset("tiny"), model=model).override(
        pipeline_model_parallel_size=pipeline, expert_model_parallel_size=experts)
    ranks = rank_parameters(run, stage_layouts(model, run.parallel))
    copies = model.vocab_size * model.hidden_size if pipeline > 1 and model.mtp_num_layers else 0
    held = sum(memory.dense_parameters + experts * memory.expert_parameters for memory in ranks)
    table = count_parameters(model)
    assert held == table.total + copies
    assert table.main_active <= table.main_total and table.mtp_active <= table.mtp_total


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_counts(name: str) -> None:
    table = count_parameters(preset(name).model)
    assert 0 < table.main_active_without_embedding < table.main_active <= table.main_total <= table.total
    assert (table.main_total < table.total) is (preset(name).model.mtp_num_layers > 0)


def test_no_torch_is_imported() -> None:
    code = ("import sys, dsv3_megatron.reports.model_table, dsv3_megatron.metrics.progress, "
            "dsv3_megatron.metrics.writer, dsv3_megatron.reports.plot; "
            "assert not {'torch', 'megatron', 'matplotlib', 'numpy'} & set(sys.modules), 'heavy import'")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
