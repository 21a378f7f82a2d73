"""What each step is taken with: DeepSeek-V3's numbers, runs without phases, and closed form against stepping."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_megatron.config.phases import LR_DECAY_STYLES
from dsv3_megatron.config.presets import PRESETS, preset
from dsv3_megatron.config.recipe import PlannedPhase, StepPlan
from dsv3_megatron.config.run import RunConfig
from tests.unit.config.plans import walk

BILLION, TRILLION = 10**9, 10**12
V3 = preset("dsv3-671b").recipe()
PHASES = {phase.name: phase for phase in V3.phases}
WHOLE_V3 = preset("dsv3-671b").override(stop_after_phase=None).recipe()


def step_at(tokens: int, iteration: int = 10**6) -> StepPlan:
    """The step of V3's run with so many tokens before it; past the warm-up unless an iteration is given."""
    plan = WHOLE_V3.step(iteration, tokens)
    assert plan is not None
    return plan


# -- DeepSeek-V3's run, section 4.2 and 4.3 of its report ------------------------------------------------


def test_2000_steps_of_warm_up_to_the_peak() -> None:
    assert step_at(0, 0).learning_rate == pytest.approx(2.2e-4 / 2000)
    step = 3072 * 4096  # the batch does not grow within them
    assert all(step_at(i * step, i).learning_rate == pytest.approx(2.2e-4 * (i + 1) / 2000) for i in range(2000))
    assert step_at(1999 * step, 1999).learning_rate == step_at(2000 * step, 2000).learning_rate == 2.2e-4
    assert step_at(1999 * step, 1999).global_batch_size == 3072


def test_the_batch_grows_from_3072_to_15360_over_469_billion_tokens() -> None:
    assert step_at(0).global_batch_size == 3072
    assert PHASES["ramp"].batch_size.at(469 * BILLION - 1) == 15360 - 1024
    for tokens in (469 * BILLION, PHASES["ramp"].end.tokens, TRILLION, 14 * TRILLION):
        assert step_at(tokens).global_batch_size == 15360
    # A straight line in tokens, in steps of 1024 from below.
    for tokens in range(0, 469 * BILLION, 7 * BILLION):
        line = 3072 + (15360 - 3072) * tokens / (469 * BILLION)
        assert 0 <= line - step_at(tokens).global_batch_size < 1024
    levels = [plateau.global_batch_size for plateau in PHASES["ramp"].plateaus]
    assert levels == list(range(3072, 15360, 1024)) and PHASES["ramp"].batch_size.sizes() == [*levels, 15360]
    held = [plateau.num_steps * plateau.global_batch_size * 4096 for plateau in PHASES["ramp"].plateaus]
    assert held == pytest.approx([469 * BILLION / 12] * 12, rel=0.002)


def test_the_peak_and_lambda_last_to_10_trillion_tokens() -> None:
    before, after = step_at(10 * TRILLION - 15360 * 4096), step_at(PHASES["decay"].start.tokens)
    assert (before.learning_rate, before.mtp_weight) == (2.2e-4, 0.3)
    assert after.mtp_weight == 0.1 and after.learning_rate == pytest.approx(2.2e-4) and after.learning_rate < 2.2e-4
    assert 0 <= PHASES["decay"].start.tokens - 10 * TRILLION < 15360 * 4096
    assert step_at(14 * TRILLION).mtp_weight == step_at(14_790 * BILLION).mtp_weight == 0.1


def test_a_cosine_to_a_tenth_over_4300_billion_tokens() -> None:
    for share in (0.1, 0.25, 0.5, 0.9):
        tokens = int((10 + 4.3 * share) * TRILLION)
        expected = 2.2e-5 + (2.2e-4 - 2.2e-5) * 0.5 * (1 + math.cos(math.pi * share))
        assert step_at(tokens).learning_rate == pytest.approx(expected, rel=1e-9)
    assert step_at(14_300 * BILLION - 15360 * 4096).learning_rate == pytest.approx(2.2e-5, rel=1e-6)


def test_two_constant_tails_of_333_and_167_billion_tokens() -> None:
    assert 0 <= PHASES["low"].start.tokens - 14_300 * BILLION < 15360 * 4096
    assert 0 <= PHASES["lowest"].start.tokens - 14_633 * BILLION < 15360 * 4096
    assert 0 <= PHASES["lowest"].end.tokens - 14_800 * BILLION < 15360 * 4096
    assert {step_at(PHASES["low"].start.tokens + n * BILLION).learning_rate for n in range(332)} == {2.2e-5}
    assert {step_at(PHASES["lowest"].start.tokens + n * BILLION).learning_rate for n in range(166)} == {7.3e-6}


def test_gamma_is_0_after_14_300_billion_tokens() -> None:
    assert step_at(0).bias_update_rate == step_at(14_300 * BILLION - 15360 * 4096).bias_update_rate == 0.001
    for tokens in (PHASES["low"].start.tokens, 14_700 * BILLION, WHOLE_V3.phases[-1].start.tokens):
        assert step_at(tokens).bias_update_rate == 0.0


def test_the_context_grows_to_32k_and_128k_in_1000_steps_each() -> None:
    end = PHASES["lowest"].end
    for name, length, batch, first in (("extension-32k", 32768, 1920, end.iteration),
                                       ("extension-128k", 131072, 480, end.iteration + 1000)):
        phase = PHASES[name]
        assert (phase.start.iteration, phase.num_steps) == (first, 1000)
        plan = step_at(phase.start.tokens)
        assert (plan.phase.training.seq_length, plan.global_batch_size, plan.learning_rate) == (length, batch, 7.3e-6)
        assert plan.num_tokens == 1920 * 32768  # both take 62.9M tokens a step
        model = phase.model
        assert (model.rope_type, model.rotary_scaling_factor, model.beta_slow, model.beta_fast) == ("yarn", 40, 1, 32)
        assert (model.original_max_position_embeddings, model.max_position_embeddings) == (4096, 163840)
        assert (model.mscale, model.mscale_all_dim) == (1.0, 1.0)
    assert all(phase.model.rope_type == "rope" and phase.training.seq_length == 4096 for phase in V3.phases[:5])


def test_the_steps_of_the_whole_run_are_a_derived_figure() -> None:
    assert (V3.num_steps, WHOLE_V3.num_steps) == (244_108, 246_108)
    assert V3.step(V3.num_steps, PHASES["lowest"].end.tokens) is None
    assert V3.spans == WHOLE_V3.spans and len(V3.spans) == 3
    assert V3.spans[0].num_samples == sum(phase.end.samples - phase.start.samples for phase in V3.phases[:5])


# -- runs without phases -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_start_small_and_reach_their_peak(name: str) -> None:
    first = preset(name).recipe().phases[0]
    warmup = first.learning_rate.warmup_iters
    assert first.step(0, 0).learning_rate == pytest.approx(preset(name).training.lr / warmup)
    assert first.step(warmup - 1, warmup - 1).learning_rate == preset(name).training.lr


# -- closed form against stepping ----------------------------------------------------------------------


@st.composite
def written_phases(draw: st.DrawFn) -> list[dict[str, Any]]:
    """A few phases that fit each other, of tiny's batch of 8 and 256 tokens."""
    batch, phases = 8, []
    for number in range(draw(st.integers(1, 4))):
        phase: dict[str, Any] = {"name": f"phase-{number}"}
        if draw(st.booleans()):
            phase["train_iters"] = draw(st.integers(1, 30))
        else:
            phase["train_tokens"] = draw(st.integers(70_000, 300_000))
            if draw(st.booleans()):
                increment, changes = 2 * draw(st.integers(1, 3)), draw(st.integers(1, 5))
                sign = -1 if batch - increment * changes > 0 and draw(st.booleans()) else 1
                batch += sign * increment * changes
                phase |= {"global_batch_size": batch, "global_batch_size_increment": increment}
        if "global_batch_size" not in phase and draw(st.booleans()):
            batch = phase["global_batch_size"] = 2 * draw(st.integers(1, 16))
        if draw(st.booleans()):
            phase |= {"lr": draw(st.floats(0, 1)), "lr_decay_style": draw(st.sampled_from(LR_DECAY_STYLES))}
        if draw(st.booleans()):
            phase["seq_length"] = draw(st.sampled_from([128, 256]))
        phases.append(phase)
    return phases


@settings(max_examples=60)
@given(phases=written_phases())
def test_boundaries_are_those_that_stepping_meets(phases: list[dict[str, Any]]) -> None:
    run = preset("tiny").override(phases=phases)
    run.validate(1)
    recipe = run.recipe()
    steps = walk(recipe)
    assert len(steps) == recipe.num_steps
    samples = 0
    planned = iter(recipe.phases)
    phase: PlannedPhase | None = None
    for iteration, tokens, plan in steps:
        if plan.phase is not phase:
            phase = next(planned)
            assert plan.phase is phase
            assert (phase.start.iteration, phase.start.tokens, phase.start.samples) == (iteration, tokens, samples)
        plateau = next(p for p in reversed(plan.phase.plateaus) if p.iteration <= iteration)
        assert plateau.global_batch_size == plan.global_batch_size
        assert plan.phase.place_of(tokens) == (iteration, tokens)
        samples += plan.global_batch_size
    assert next(planned, None) is None
    assert recipe.phases[-1].end.samples == samples == sum(span.num_samples for span in recipe.spans)
    for written, done in zip(phases, recipe.phases, strict=True):
        if "train_iters" in written:
            assert done.num_steps == written["train_iters"]
        else:  # the step that reaches its end is its last
            last = done.plateaus[-1].global_batch_size * done.training.seq_length
            assert 0 <= done.end.tokens - done.planned_end_token < last


def test_a_position_is_all_that_a_step_depends_on() -> None:
    """A recipe asked in any order, from any place, answers as it did on the way."""
    run = _three_phases()
    steps = walk(run.recipe())
    again = run.recipe()
    for iteration, tokens, plan in reversed(steps):
        assert again.step(iteration, tokens) == plan


def test_roundings_do_not_add_up() -> None:
    """Phases given in tokens end where they were planned to, whatever those before them overshot."""
    recipe = preset("tiny").override(phases=[
        {"name": str(number), "train_tokens": 3000} for number in range(10)]).recipe()
    assert recipe.num_steps == -(-30_000 // 2048)


def test_a_run_that_left_its_recipe_stops_short_of_a_boundary() -> None:
    """Resumed from a place that no recipe of its meets: no step crosses an end, and the next phase follows."""
    recipe = _three_phases().recipe()
    first, second, third = recipe.phases
    odd = first.end.tokens - 1
    assert recipe.step(7, odd).phase is second  # type: ignore[union-attr]
    assert recipe.step(7, second.end.tokens - 5).phase is third  # type: ignore[union-attr]
    assert recipe.step(7, third.end.tokens - 5) is None


def test_datasets_are_shared_by_phases_of_equal_length_and_files() -> None:
    recipe = _three_phases().recipe()
    assert [(span.first_phase, span.last_phase) for span in recipe.spans] == [(0, 1), (2, 2)]
    assert recipe.spans[1].first_sample == recipe.spans[0].num_samples == recipe.phases[2].start.samples
    assert [recipe.span_of(phase).index for phase in recipe.phases] == [0, 0, 1]
    other = _three_phases(data_path=["elsewhere"]).recipe()
    assert [span.first_phase for span in other.spans] == [0, 1, 2]


def test_a_run_in_a_phase_is_described_as_it_is_there() -> None:
    run = _three_phases()
    view = run.in_phase(run.recipe().phases[2])
    assert (view.model.rope_type, view.model.max_position_embeddings, view.training.seq_length) == ("yarn", 512, 512)
    assert view.training.phases == run.training.phases
    assert dataclasses.replace(view, model=run.model, training=run.training) == run


def test_a_layout_does_not_change_the_steps() -> None:
    run = _three_phases()
    split = run.override(micro_batch_size=1, expert_model_parallel_size=2, pipeline_model_parallel_size=2)
    split.validate(4)
    assert [plan[:2] for plan in walk(split.recipe())] == [plan[:2] for plan in walk(run.recipe())]


def _three_phases(**second: Any) -> RunConfig:
    return preset("tiny").override(phases=[
        {"name": "one", "train_tokens": 300_000, "global_batch_size": 16, "global_batch_size_increment": 2,
         "lr_warmup_iters": 5},
        {"name": "two", "train_iters": 20, "lr": 1e-4, "lr_decay_style": "cosine", **second},
        {"name": "three", "train_iters": 20, "seq_length": 512, "global_batch_size": 8, "rope_type": "yarn",
         "rotary_scaling_factor": 2.0}])
