"""Which gradients a layout in FP8 rounds in groups of its own, how errors are measured, and what rounding explains."""

from __future__ import annotations

import pytest
import torch

from dsv3_megatron.certification.certified_layout import initial_weights
from dsv3_megatron.certification.comparison import (
    FP8,
    FP8_OF_PASSED_LATENTS,
    FP32,
    Scale,
    compare_steps,
    gradient_roundings,
    relative_error,
)
from dsv3_megatron.certification.defined_steps import defined_steps
from dsv3_megatron.certification.random_samples import RandomSamples
from dsv3_megatron.certification.rank_step import RankPlace, RankStep
from dsv3_megatron.certification.shrunk_run import shrink
from dsv3_megatron.certification.verdict import regroups, tolerances_of
from dsv3_megatron.certification.weight_names import reference_from_whole, whole_from_reference
from dsv3_megatron.config.load import parse_command
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.metrics.run_records import StepReport
from dsv3_megatron.model.global_names import WholeParameter

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


def step_with(gradient: torch.Tensor) -> RankStep:
    """A step of one process of which one gradient is looked at."""
    report = StepReport(1, 2, 64, 3.0, (), None, 1.0, 1e-3, 2, 0.1)
    part = WholeParameter(ATTENTION, tuple(gradient.shape), torch.nn.Parameter(gradient), gradient, None, ())
    return RankStep(RankPlace(0, 0, 0, 0, 0), report, [part], [], {}, {}, False, 1)


@pytest.mark.parametrize(("rounding", "error", "is_equal"), [
    (None, 3e-5, False), (5e-6, 1.9e-5, True), (5e-6, 3e-5, False), (9e-6, 3e-5, True), (9e-6, 4e-5, False),
    (1e-3, 7e-5, True), (1e-3, 9e-5, False)])  # one process that is wrong itself explains no more than its tolerance
def test_what_rounding_explains_of_a_gradient(rounding: float | None, error: float, is_equal: bool) -> None:
    one, layout = torch.ones(3, dtype=torch.float64), torch.tensor([1.0, 1.0 - error, 1.0], dtype=torch.float64)
    roundings = None if rounding is None else {ATTENTION: rounding}
    found = compare_steps(step_with(one), [step_with(layout)], "step 2", FP32, roundings=roundings)
    assert bool(found.differences) != is_equal


def test_the_second_step_from_given_weights_is_the_definitions() -> None:
    run = small("--mtp-num-layers 1 --num-layers 2", 1)
    samples, layers = RandomSamples.of_run(run, 2), run.model.num_layers
    steps, _ = defined_steps(run, samples, initial_weights(run.model, 0), 2)
    names = ("embedding.word_embeddings.weight", "mtp.layers.0.eh_proj.weight", EXPERT, ATTENTION)
    whole = {name: whole_from_reference(name, steps[0].values, layers) for name in names}
    weights = steps[0].values | reference_from_whole(whole, steps[0].biases, layers)
    (again,), _ = defined_steps(run, samples, weights, 1, first=2)
    assert again.loads == steps[1].loads and again.lm_loss == pytest.approx(steps[1].lm_loss, abs=1e-12)
    for name, gradient in steps[1].gradients.items():
        torch.testing.assert_close(again.gradients[name], gradient, rtol=1e-12, atol=1e-12)

    off = whole_from_reference(ATTENTION, again.gradients, layers) * (1 + 1e-5)
    assert gradient_roundings(step_with(off), again, layers)[ATTENTION] == pytest.approx(1e-5, rel=1e-6)
