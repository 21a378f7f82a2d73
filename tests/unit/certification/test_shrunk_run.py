"""What a small run keeps of a large one, what is told of the rest, and when there is none."""

from __future__ import annotations

import pytest

from dsv3_megatron.certification.shrunk_run import shrink
from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.load import parse_command
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.parallel.layout import layout_string, stage_layouts

REPORT = ("--preset dsv3-671b --fp8 blockwise --pipeline-model-parallel-size 16 --expert-model-parallel-size 64 "
          "--pipeline-schedule dualpipe --tensor-model-parallel-size 1").split()


def run_of(*flags: str) -> RunConfig:
    return parse_command(["--preset", "tiny", *flags]).run


def test_the_report_s_layout_keeps_its_kinds_on_sixteen_processes() -> None:
    small = shrink(parse_command(REPORT).run, 2048, 16)
    parallel = small.run.parallel
    assert (parallel.pipeline_model_parallel_size, parallel.expert_model_parallel_size) == (4, 2)
    assert parallel.schedule == "dualpipe" and small.run.fp8.is_enabled and small.run.model.mtp_num_layers == 1
    assert parallel.expert_data_parallel_size(small.world_size) == 2 and small.world_size == 16
    told = "\n".join(small.reductions)
    assert "processes 2048 -> 16" in told and "pipeline ranks 16 -> 4" in told
    assert "expert parallelism 64 -> 2: exchanges between more ranks are not proved" in told


def test_replicas_go_first_and_only_what_must_go() -> None:
    run = run_of("--expert-model-parallel-size", "4", "--global-batch-size", "64")
    assert shrink(run, 32, 32).reductions == ()
    small = shrink(run, 32, 8)
    assert small.run.parallel == run.parallel and small.world_size == 8
    assert [text.split(":")[0] for text in small.reductions][:3] == [
        "processes 32 -> 8", "data parallelism 32 -> 8", "replicas of experts 8 -> 2"]
    assert shrink(run, 32, 4).run.parallel.expert_model_parallel_size == 2
    alone = shrink(run, 32, 2)
    assert alone.run.parallel.expert_data_parallel_size(alone.world_size) == 1
    assert any(text.startswith("replicas of experts 8 -> 1: sums of experts' gradients") for text in alone.reductions)


def test_too_few_processes_are_refused_with_the_number_that_would_do() -> None:
    run = run_of("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2")
    with pytest.raises(ConfigError, match="--processes=2 are too few: .* has 4; give --processes 4"):
        shrink(run, 8, 2)


@pytest.mark.parametrize(("flags", "ranks", "most", "expected"), [
    ("--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Ettttttt|tmL --num-layers 8", 2, 8, "Ettt|tmL"),
    ("--pipeline-model-parallel-size 8 --pipeline-model-parallel-layout Et|ttt|ttt|t|t|t|m|L --num-layers 10", 8, 4,
     "Et|ttt|m|L"),
    ("--pipeline-model-parallel-size 8 --pipeline-model-parallel-layout Et|ttt|ttt|t|t|t|m|L --num-layers 10", 8, 2,
     "Etm|L"),
])
def test_the_stages_keep_their_ends_and_their_unevenness(flags: str, ranks: int, most: int, expected: str) -> None:
    small = shrink(run_of(*flags.split()), ranks, most).run
    assert layout_string(stage_layouts(small.model, small.parallel)) == expected


def test_a_small_run_is_its_own_small_run() -> None:
    """What is asked of it is not changed a second time, or a printed command would not do the same again."""
    run = run_of("--pipeline-model-parallel-size", "2", "--pipeline-schedule", "zbv", "--num-layers", "5",
                 "--mtp-num-layers", "2", "--recompute-granularity", "full", "--reset-attention-mask")
    small = shrink(run, 2, 8)
    assert shrink(small.run, 2, 8).run == small.run


def test_every_token_leaves_out_experts_that_it_could_have_gone_to() -> None:
    for preset in ("tiny", "laptop", "dsv3-16b", "dsv3-671b"):
        run = parse_command(["--preset", preset]).run
        model = shrink(run, run.parallel.minimum_world_size, 4).run.model
        reachable = model.num_experts // model.moe_router_num_groups * model.moe_router_group_topk
        assert model.moe_router_topk < reachable <= model.num_experts


def test_sums_that_cut_bits_off_are_not_certified_and_the_certificate_says_so() -> None:
    run = run_of("--fp8", "blockwise", "--fp8-backend", "reference", "--fp8-accumulation", "fp22")
    small = shrink(run, 1, 1)
    assert small.run.fp8.fp8_accumulation == "fp32"
    assert any("accumulation fp22 -> fp32" in text for text in small.reductions)
    assert not any("accumulation" in text for text in shrink(run_of("--fp8", "blockwise"), 1, 1).reductions)
