"""Which stage holds what: complete and in order whatever the model, balanced, and as Megatron-Core reads it."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.config.parallel import ParallelConfig
from dsv3_megatron.config.presets import PRESETS, preset
from dsv3_megatron.parallel import layout as layouts_of_stages
from dsv3_megatron.parallel.layout import StageLayout, layout_string, stage_layouts

TINY = preset("tiny").model


def split(pipeline: int, chunks: int = 1, layout: str | None = None) -> ParallelConfig:
    return ParallelConfig(pipeline_model_parallel_size=pipeline, num_virtual_stages_per_pipeline_rank=chunks,
                          pipeline_model_parallel_layout=layout)


def check_complete(layouts: list[StageLayout], model: ModelConfig, num_stages: int, *, bare: tuple[int, ...] = ()
                   ) -> None:
    """Every layer once and in order, at least one a stage but for those without; ends where they belong."""
    assert [layout.stage for layout in layouts] == list(range(num_stages))
    assert [i for layout in layouts for i in layout.layer_ids] == list(range(model.num_layers))
    assert [layout.stage for layout in layouts if not layout.layer_ids] == list(bare)
    assert [layout.has_embedding for layout in layouts] == [True] + [False] * (num_stages - 1)
    assert [layout.has_loss for layout in layouts] == [False] * (num_stages - 1) + [True]
    assert layouts[-1].mtp_layer_ids == tuple(range(model.mtp_num_layers))
    assert not any(layout.mtp_layer_ids for layout in layouts[:-1])


@st.composite
def models(draw: st.DrawFn, max_layers: int = 70) -> ModelConfig:
    layers = draw(st.integers(1, max_layers))
    return dataclasses.replace(
        TINY, num_layers=layers, num_dense_layers=draw(st.integers(0, layers)), mtp_num_layers=draw(st.integers(0, 3)),
        hidden_size=draw(st.sampled_from([64, 512, 7168])), vocab_size=draw(st.sampled_from([256, 32000, 129280])),
        ffn_hidden_size=draw(st.sampled_from([96, 1536, 18432])), q_lora_rank=draw(st.sampled_from([None, 64, 1536])))


@st.composite
def models_and_splits(draw: st.DrawFn, max_layers: int = 70) -> tuple[ModelConfig, ParallelConfig]:
    model = draw(models(max_layers))
    chunks = draw(st.integers(1, max(1, min(3, model.num_layers // 2))))
    return model, split(draw(st.integers(2 if chunks > 1 else 1, model.num_layers // chunks)), chunks)


@settings(max_examples=60)
@given(models_and_splits())
def test_every_split_holds_the_whole_model_in_order(case: tuple[ModelConfig, ParallelConfig]) -> None:
    model, parallel = case
    check_complete(stage_layouts(model, parallel), model, parallel.num_stages)


def stage_costs(model: ModelConfig, counts: tuple[int, ...]) -> list[int]:
    """Multiply-adds per token of each stage, from the parameters a token passes through."""
    from dsv3_megatron.metrics.parameters import count_parameters

    without_ends = {"embedding", "head", "final_norm", "norms"}

    def work(num_layers: int, num_dense: int) -> int:
        part = dataclasses.replace(model, num_layers=num_layers, num_dense_layers=num_dense, mtp_num_layers=0)
        return sum(c.active for c in count_parameters(part).main if c.part not in without_ends)

    dense, moe = work(1, 1), work(1, 0)
    head = model.hidden_size * model.vocab_size
    # An MTP module: a layer like the last one, the projection of two hidden states, the shared head.
    last = moe if model.num_moe_layers else dense
    tail = head + model.mtp_num_layers * (last + 2 * model.hidden_size**2 + head)
    kinds = [dense] * model.num_dense_layers + [moe] * model.num_moe_layers
    ends = list(itertools.accumulate(counts, initial=0))
    costs = [sum(kinds[a:b]) for a, b in itertools.pairwise(ends)]
    costs[-1] += tail
    return costs


@settings(max_examples=60)
@given(models_and_splits(max_layers=10))
def test_no_other_split_has_a_lighter_heaviest_stage(case: tuple[ModelConfig, ParallelConfig]) -> None:
    model, parallel = case
    stages = parallel.num_stages
    found = tuple(len(layout.layer_ids) for layout in stage_layouts(model, parallel))
    every = [tuple(b - a for a, b in itertools.pairwise((0, *cuts, model.num_layers)))
             for cuts in itertools.combinations(range(1, model.num_layers), stages - 1)]
    assert found in every
    assert max(stage_costs(model, found)) == min(max(stage_costs(model, counts)) for counts in every)


def test_the_layer_of_an_mtp_module_is_dense_where_the_last_layer_is() -> None:
    """Four layers and a module of nearly a layer's work, five in all: the module's stage has one layer of them."""
    model = dataclasses.replace(TINY, num_layers=4, num_dense_layers=4, ffn_hidden_size=100_000, vocab_size=256)
    assert [len(layout.layer_ids) for layout in stage_layouts(model, split(2))] == [3, 1]
    without = dataclasses.replace(model, mtp_num_layers=0)
    assert [len(layout.layer_ids) for layout in stage_layouts(without, split(2))] == [2, 2]


def every_start(costs: list[int], tail: int, num_stages: int) -> tuple[int, ...]:
    """Layers per stage by trying every start of every stage: the earliest of the best."""
    prefix = list(itertools.accumulate(costs, initial=0))
    best: list[float] = [0.0, *[float("inf")] * len(costs)]
    choices = []
    for stage in range(num_stages):
        extra = tail if stage == num_stages - 1 else 0
        pairs = [min(((max(best[start], prefix[end] - prefix[start] + extra), start) for start in range(end)),
                     default=(float("inf"), 0)) for end in range(len(costs) + 1)]
        best = [worst for worst, _ in pairs]
        choices.append([start for _, start in pairs])
    ends = [len(costs)]
    for choice in reversed(choices):
        ends.append(choice[ends[-1]])
    return tuple(a - b for a, b in itertools.pairwise(ends))[::-1]


@given(st.data(), st.lists(st.integers(1, 6), min_size=1, max_size=14), st.integers(0, 12))
def test_the_split_is_the_one_that_trying_everything_finds(data: st.DataObject, costs: list[int], tail: int) -> None:
    num_stages = data.draw(st.integers(1, len(costs)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layouts_of_stages, "_layer_costs", lambda _: (costs, tail))
        assert layouts_of_stages._balanced_counts.__wrapped__(TINY, num_stages) == every_start(costs, tail, num_stages)


def test_thousands_of_layers_are_split_in_no_time() -> None:
    started = time.process_time()
    for num_stages in (1, 16, 128):
        check_complete(stage_layouts(dataclasses.replace(TINY, num_layers=2000), split(num_stages)),
                       dataclasses.replace(TINY, num_layers=2000), num_stages)
    assert time.process_time() - started < 10  # trying every start took minutes


@pytest.mark.parametrize("text", ["E(t)*999999999mL", "Et*1000000000000000000000|tmL", "E(t*2000)*2000mL"])
def test_repetitions_beyond_all_measure_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="more than the 2000 layers that a model may have"):
        stage_layouts(TINY, split(1, layout=text))


def test_the_671b_layout_balances_its_sixteen_stages() -> None:
    run = preset("dsv3-671b")
    layouts = stage_layouts(run.model, run.parallel)
    check_complete(layouts, run.model, 16)
    counts = [len(layout.layer_ids) for layout in layouts]
    assert max(counts) == 4 and counts[-1] < 4
    assert layout_string(layouts).startswith("Ett") and layout_string(layouts).endswith("mL")


# -- Megatron-Core's notation --------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_strings_round_trip(name: str) -> None:
    run = preset(name)
    for pipeline in (1, 2, run.model.num_layers):
        layouts = stage_layouts(run.model, split(pipeline))
        assert stage_layouts(run.model, split(pipeline, layout=layout_string(layouts))) == layouts


@pytest.mark.parametrize(("text", "counts"), [
    ("Ett|ttmL", (2, 2)), ("Et|tttmL", (1, 3)), ("E,t*3 | t,mL", (3, 1)), ("Ettt|(t)*1mL", (3, 1)),
    ("E(t)*2|(tt)*1m*1L", (2, 2)), ("Etttt|mL", (4, 0)),
    ("E|ttttmL", (0, 4)), ("E|t*4mL", (0, 4)),
])
def test_explicit_layouts(text: str, counts: tuple[int, ...]) -> None:
    layouts = stage_layouts(TINY, split(2, layout=text))
    check_complete(layouts, TINY, 2, bare=tuple(stage for stage, count in enumerate(counts) if not count))
    assert tuple(len(layout.layer_ids) for layout in layouts) == counts


def test_as_many_stages_as_layers_and_one_for_the_mtp_modules() -> None:
    """Megatron-LM's layout of DeepSeek-V3 in 32 stages, and one more stage than there are layers."""
    v3 = preset("dsv3-671b").model
    layouts = stage_layouts(v3, split(8, 4, "Et|(tt|)*30mL"))
    check_complete(layouts, v3, 32, bare=(31,))
    for text, written in (("Et|(t|)*3mL", "Et|t|t|t|mL"), ("E|(t|)*4mL", "E|t|t|t|t|mL")):
        parallel = split(written.count("|") + 1, layout=text)
        parallel.validate(TINY, seq_length=64)
        layouts = stage_layouts(TINY, parallel)
        assert layout_string(layouts) == written
        check_complete(layouts, TINY, len(layouts), bare=(0, 5) if len(layouts) == 6 else (4,))
    with pytest.raises(ConfigError, match="makes 5 stages, more than num_layers=4; use at most 4 stages"):
        split(5).validate(TINY, seq_length=64)
    with pytest.raises(ConfigError, match="use at most 7 stages with embedding, MTP modules and loss in stages of"):
        split(8, layout="E|(t|)*4|m|L").validate(TINY, seq_length=64)
    with pytest.raises(ConfigError, match="use at most 6 stages with embedding and loss in stages of their own"):
        split(7, layout="E|(t|)*4||L").validate(dataclasses.replace(TINY, mtp_num_layers=0), seq_length=64)


@pytest.mark.parametrize(("text", "stages"), [
    ("Ettt|t|m|L", 4), ("Ettttm|L", 2), ("Ett|ttm|L", 3), ("E|t*4|m|L", 4), ("E|(t|)*4m|L", 7)])
def test_mtp_modules_in_a_stage_before_the_loss(text: str, stages: int) -> None:
    parallel = split(stages, layout=text)
    parallel.validate(TINY, seq_length=64)
    layouts = stage_layouts(TINY, parallel)
    assert [layout.has_loss for layout in layouts] == [False] * (stages - 1) + [True]
    assert [layout.mtp_layer_ids for layout in layouts] == [()] * (stages - 2) + [(0,), ()]
    assert [layout.num_hidden_outputs for layout in layouts] == [1] * (stages - 2) + [2, 0]
    assert [layer for layout in layouts for layer in layout.layer_ids] == list(range(4))
    assert layout_string(layouts).endswith("m|L")


def test_repetitions_of_whole_stages() -> None:
    layouts = stage_layouts(TINY, split(4, layout="Et|(t|)*2tmL"))
    assert layout_string(layouts) == "Et|t|t|tmL"


@pytest.fixture(scope="module")
def megatron_core() -> Iterator[None]:
    """Megatron-Core, importable without CUDA; the stand-ins are taken back unless they were there before."""
    from dsv3_megatron.platform import cpu, prepare

    was_installed = cpu.installed()
    prepare()
    yield
    if not was_installed:
        cpu.remove_stand_ins()


@settings(max_examples=25)
@given(case=models_and_splits(max_layers=16))
def test_megatron_core_reads_the_same_layout(megatron_core: None, case: tuple[ModelConfig, ParallelConfig]) -> None:
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    model, parallel = case
    layouts = stage_layouts(model, parallel)
    ranks = parallel.pipeline_model_parallel_size
    theirs = PipelineParallelLayerLayout(layout_string(layouts), ranks)
    theirs.validate_layer_layout(num_layers=model.num_layers, mtp_num_layers=model.mtp_num_layers or None)
    assert theirs.virtual_pipeline_model_parallel_size == parallel.num_virtual_stages_per_pipeline_rank
    order = []
    for layout in layouts:
        kinds = theirs.layout[layout.stage % ranks][layout.stage // ranks]
        assert kinds.count(LayerType.decoder) == len(layout.layer_ids)
        assert kinds.count(LayerType.mtp) == len(layout.mtp_layer_ids)
        assert (LayerType.embedding in kinds, LayerType.loss in kinds) == (layout.has_embedding, layout.has_loss)
        order += kinds
    assert theirs.flatten_layout == order  # their layer ids follow this order, as ours do


def cuts(model: ModelConfig, num_stages: int) -> Iterator[str]:
    """Every layout of a model in so many stages, in their right order, empty stages left out."""
    whole = "E" + "t" * model.num_layers + "m" * model.mtp_num_layers + "L"
    for places in itertools.combinations(range(1, len(whole)), num_stages - 1):
        yield "|".join(whole[first:end] for first, end in itertools.pairwise((0, *places, len(whole))))


@pytest.mark.parametrize("mtp_num_layers", [0, 1, 2])
@pytest.mark.parametrize(("pipeline", "chunks"), [(2, 1), (3, 1), (4, 1), (5, 1), (2, 2), (2, 3)])
def test_megatron_core_takes_the_same_layouts(megatron_core: None, pipeline: int, chunks: int, mtp_num_layers: int
                                              ) -> None:
    """Of all ways to cut a model: those with the MTP modules in one stage, with the loss or before it."""
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    model = dataclasses.replace(TINY, mtp_num_layers=mtp_num_layers)
    ours, theirs, apart = set(), set(), set()
    for text in cuts(model, pipeline * chunks):
        with contextlib.suppress(AssertionError):
            is_apart = PipelineParallelLayerLayout(text, pipeline).validate_layer_layout(
                num_layers=model.num_layers, mtp_num_layers=mtp_num_layers or None)
            theirs.add(text)
            if is_apart:
                apart.add(text)
        with contextlib.suppress(ConfigError):
            layouts = stage_layouts(model, split(pipeline, chunks, text))
            assert layout_string(layouts) == text
            ours.add(text)
    assert ours == theirs
    assert apart == {text for text in ours if text.endswith("m|L")} and bool(apart) == (mtp_num_layers > 0)


def test_mtp_modules_in_two_stages() -> None:
    model = dataclasses.replace(TINY, mtp_num_layers=2)
    for text in ("Etttt|m|m|L", "Etttt|m|mL", "Ett|ttm|mL"):
        with pytest.raises(ConfigError) as error:
            stage_layouts(model, split(text.count("|") + 1, layout=text))
        assert str(error.value) == (f"{NAME}{text!r} has MTP modules (m) in stages 1 and 2; all mtp_num_layers=2 of "
                                    "them are in one stage, as in Megatron-Core: end with 'mmL' or 'mm|L'")


NAME = "pipeline_model_parallel_layout="


@pytest.mark.parametrize(("text", "pipeline", "chunks", "message"), [
    ("Etx|ttmyL", 2, 1, "'Etx|ttmyL' has x y, which means nothing; the notation is: E embedding, t transformer layer, "
                        "m MTP module, L loss, | next stage; x*3 and (xy)*3 repeat"),
    ("Et(t|ttmL", 2, 1, "'Et(t|ttmL' has (, which means nothing; the notation is: "),
    ("Ett|ttmL", 4, 1, "'Ett|ttmL' has 2 stages; pipeline_model_parallel_size=4 x "
                       "num_virtual_stages_per_pipeline_rank=1 needs 4"),
    ("Ett|ttmL", 2, 2, "'Ett|ttmL' has 2 stages; pipeline_model_parallel_size=2 x "
                       "num_virtual_stages_per_pipeline_rank=2 needs 4"),
    ("Ett|tmL", 2, 1, "'Ett|tmL' holds 3 transformer layers (t); num_layers=4"),
    ("Ett||ttmL", 3, 1, "'Ett||ttmL' leaves stage 1 without a transformer layer (t); give it at least one: only the "
                        "first stage, with the embedding (E), one with the MTP modules (m), and the last may do "
                        "without"),
    ("|ttttmL", 2, 1, "'|ttttmL' leaves stage 0 without a transformer layer (t)"),
    ("Ettt|t|m||L", 5, 1, "'Ettt|t|m||L' leaves stage 3 without a transformer layer (t)"),
    ("Ett|tt|m|", 4, 1, "'Ett|tt|m|' must end with 'mL' or 'm|L': "),
    ("Ett|tt|mL|", 4, 1, "'Ett|tt|mL|' must end with 'mL' or 'm|L': "),
    ("Ett|tt|m|mL", 4, 1, "'Ett|tt|m|mL' must end with 'mL' or 'm|L': "),
    ("Ett|m|ttL", 3, 1, "'Ett|m|ttL' must end with 'mL' or 'm|L': "),
    ("tt|ttmL", 2, 1, "'tt|ttmL' must begin with the embedding (E) and have it once"),
    ("Ett|EttmL", 2, 1, "'Ett|EttmL' must begin with the embedding (E) and have it once"),
    ("Ett|ttL", 2, 1, "'Ett|ttL' must end with 'mL' or 'm|L': all mtp_num_layers=1 MTP modules (m) after the last "
                      "transformer layer (t), then the loss (L), in the same stage or in one behind it, which is the "
                      "last"),
    ("Ettm|ttL", 2, 1, "'Ettm|ttL' must end with 'mL' or 'm|L': "),
    ("EttL|ttmL", 2, 1, "'EttL|ttmL' must end with 'mL' or 'm|L': "),
    ("Ett|ttm", 2, 1, "'Ett|ttm' must end with 'mL' or 'm|L': "),
    ("Ett|tmtL", 2, 1, "'Ett|tmtL' must end with 'mL' or 'm|L': "),
    ("Ett|ttmmL", 2, 1, "'Ett|ttmmL' must end with 'mL' or 'm|L': "),
])
def test_a_wrong_layout(text: str, pipeline: int, chunks: int, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        stage_layouts(TINY, split(pipeline, chunks, text))
    assert str(error.value).startswith(NAME + message)
