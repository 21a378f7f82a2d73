"""Phases of a recipe as days, device-hours and money."""

from __future__ import annotations

import dataclasses

import pytest

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.phases import Phase
from dsv3_megatron.config.presets import preset
from dsv3_megatron.planning.machine.hardware_tables import find_hardware
from dsv3_megatron.planning.run_cost import main_phase, only_phase, run_cost
from dsv3_megatron.planning.time.work import Setting

SETTING = Setting(find_hardware("h800"), 64)


@pytest.fixture(scope="module")
def run():
    base = preset("dsv3-16b").override(global_batch_size=256, pipeline_model_parallel_size=4,
                                       expert_model_parallel_size=8, pipeline_schedule="dualpipe")
    phases = (Phase("ramp", train_tokens=10 * 2**24, global_batch_size=512, global_batch_size_increment=64),
              Phase("long", train_iters=20), Phase("other", train_iters=5, global_batch_size=80))
    return base.override(phases=phases).override(global_batch_size=128)


def test_phases_add_up(run) -> None:
    cost = run_cost(run, SETTING, price_per_gpu_hour=2.0)
    recipe = run.recipe()
    assert [phase.name for phase in cost.phases] == ["ramp", "long", "other"]
    assert cost.num_tokens == sum(phase.num_tokens for phase in cost.phases if phase.seconds is not None)
    for phase, planned in zip(cost.phases[:2], recipe.phases, strict=False):
        assert phase.num_steps == pytest.approx(planned.num_steps)
        assert phase.num_tokens == pytest.approx(planned.end.tokens - planned.start.tokens)
        assert phase.gpu_hours == pytest.approx(phase.seconds / 3600 * 64)
    assert cost.price(cost.gpu_hours) == pytest.approx(2 * cost.gpu_hours)
    assert cost.days == pytest.approx(cost.gpu_hours / 64 / 24)
    long = cost.phases[1]
    assert long.last_step is not None and long.seconds == pytest.approx(20 * long.last_step.seconds)


def test_batches_that_the_schedule_cannot_do_are_costed_under_another(run) -> None:
    """Batches of 144, 176, ... sequences over 16 replicas are an odd number of micro-batches, which has no half."""
    ramp = Phase("ramp", train_tokens=10 * 2**24, global_batch_size=512, global_batch_size_increment=16)
    cost = run_cost(run.override(phases=()).override(phases=(ramp,), global_batch_size=144), SETTING)
    assert "a growing batch whose micro-batches dualpipe cannot do, costed under zb1p" in cost.phases[0].note


def test_a_ramp_begins_under_dualpipe(run) -> None:
    """64 sequences over 16 replicas are 4 micro-batches, as many as there are ranks."""
    assert run_cost(run.override(global_batch_size=64), SETTING).phases[0].note == ""


def test_a_phase_that_the_layout_cannot_do(run) -> None:
    cost = run_cost(run, SETTING)
    assert cost.phases[2].seconds is None and cost.phases[2].gpu_hours is None
    assert cost.phases[2].note.startswith("the layout cannot do it: global_batch_size=80 over micro_batch_size=1 x ")
    assert "under pipeline_schedule=dualpipe" in cost.phases[2].note
    asked = []

    def find(part, setting):
        asked.append(part.training.global_batch_size)
        return dataclasses.replace(part, parallel=dataclasses.replace(part.parallel, pipeline_schedule="1f1b")), "1F1B"

    cost = run_cost(run, SETTING, find_layout=find)
    assert asked == [80] and cost.phases[2].note == "under another layout: 1F1B"
    assert cost.phases[2].seconds is not None
    none = run_cost(run, SETTING, find_layout=lambda part, setting: (None, "too small"))
    assert none.phases[2].note == "no layout can do it: too small"


def test_tokens_cut_the_recipe_or_let_its_last_phase_go_on(run) -> None:
    half = run_cost(run, SETTING, tokens=5 * 2**24)
    assert [phase.name for phase in half.phases] == ["ramp"]
    assert half.num_tokens == pytest.approx(5 * 2**24)
    single = preset("dsv3-16b").override(global_batch_size=512)
    beyond = run_cost(single, SETTING, tokens=1e12)
    assert beyond.num_tokens == pytest.approx(1e12)
    assert beyond.gpu_hours == pytest.approx(beyond.phases[0].last_step.gpu_hours_per_trillion_tokens)


@pytest.mark.parametrize(("field", "message"), [
    ("tokens", "--tokens=0 must be greater than 0; leave it out"),
    ("price_per_gpu_hour", "--price-per-gpu-hour=0 must be greater than 0; leave it out")])
def test_wrong_numbers(run, field: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_cost(run, SETTING, **{field: 0.0})


def test_the_longest_phase_is_what_a_step_is_judged_by(run) -> None:
    v3 = preset("dsv3-671b")
    phase = main_phase(v3)
    assert phase.name == "constant"
    one = only_phase(v3, phase)
    assert (one.training.global_batch_size, one.training.seq_length, one.training.phases) == (15360, 4096, ())
    assert only_phase(v3, phase, global_batch_size=3072).training.global_batch_size == 3072
