"""Which gradients a layout in FP8 rounds in groups of its own, and how errors are measured."""

from __future__ import annotations

import torch

from dsv3_megatron.certification.comparison import FP8, FP8_OF_PASSED_LATENTS, FP32, Scale, relative_error
from dsv3_megatron.certification.shrunk_run import shrink
from dsv3_megatron.certification.verdict import regroups, tolerances_of
from dsv3_megatron.config.load import parse_command
from dsv3_megatron.config.run import RunConfig

ATTENTION = "decoder.layers.1.self_attention.linear_proj.weight"
EXPERT = "decoder.layers.1.mlp.experts.3.linear_fc1.weight"


def small(flags: str, world_size: int) -> RunConfig:
    return shrink(parse_command(["--preset", "tiny", *flags.split()]).run, world_size, world_size).run


def test_gradients_that_fp8_rounds_in_groups_of_tokens() -> None:
    run = small("--fp8 blockwise --mtp-num-layers 1", 1)
    regrouped = regroups(run)
    assert regrouped(ATTENTION) and regrouped(EXPERT)
    for exact in ("decoder.layers.1.mlp.router.weight", "embedding.word_embeddings.weight", "output_layer.weight",
                  "decoder.layers.1.self_attention.kv_layernorm.weight"):
        assert not regrouped(exact)
    assert tolerances_of(run) == FP8 and FP8.gradient == FP32.gradient


def test_an_override_and_a_run_without_fp8_are_exact() -> None:
    wide = regroups(small("--fp8 blockwise --fp8-override *.linear_proj=wgrad:bf16,cached_input:bf16", 1))
    assert not wide(ATTENTION) and wide(EXPERT)
    plain = regroups(small("", 1))
    assert not plain(ATTENTION) and not plain(EXPERT)


def test_blocks_of_tokens_and_latents_that_are_passed_reach_every_gradient() -> None:
    for flags, size in (("--fp8-grad-grouping block", 1), ("--context-parallel-size 2", 2),
                        ("--context-parallel-size 2 --cp-comm-type all_gather", 2)):
        assert regroups(small(f"--fp8 blockwise {flags}", size))("output_layer.weight")


def test_shares_of_a_latents_gradient_have_a_tolerance_of_their_own_where_ranks_round_them() -> None:
    ring = small("--fp8 blockwise --context-parallel-size 2", 2)
    assert tolerances_of(ring) == FP8_OF_PASSED_LATENTS
    heads = small("--fp8 blockwise --context-parallel-size 2 --cp-comm-type a2a", 2)
    assert tolerances_of(heads) == FP8
    assert not regroups(heads)("decoder.layers.1.self_attention.kv_layernorm.weight") and regroups(heads)(ATTENTION)
    assert tolerances_of(small("--context-parallel-size 2", 2)) == FP32


def test_an_error_of_each_entry() -> None:
    expected, found = torch.tensor([1.0, 1e-6, 0.0]), torch.tensor([1.0, 2e-6, 0.0])
    assert relative_error(found, expected) < 2e-6
    assert abs(relative_error(found, expected, Scale(expected.double())) - 1.0) < 1e-6
    assert relative_error(torch.tensor([1.0, float("nan"), 0.0]), expected, Scale(expected.double())) == float("inf")
    assert relative_error(torch.tensor([1.0, 1e-6, 3.0]), expected, Scale(expected.double())) == 3.0
