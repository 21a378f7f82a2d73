"""Warm-up, decay and their bounds."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_megatron.config.phases import LR_DECAY_STYLES
from dsv3_megatron.config.presets import preset
from dsv3_megatron.config.recipe import PlannedPhase
from tests.unit.config.plans import walk


def flat(**fields: Any) -> PlannedPhase:
    """The one phase of a run with a peak of 1, an end of 0.1 and 10 of 110 steps of warm-up."""
    run = preset("tiny").override(**{"lr": 1.0, "min_lr": 0.1, "lr_warmup_iters": 10, "train_iters": 110,
                                     "lr_decay_style": "cosine", **fields})
    (phase,) = run.recipe().phases
    return phase


def rate(phase: PlannedPhase, iteration: int) -> float:
    """Learning rate of a step of `flat`, also beyond its end."""
    return phase.step(iteration, iteration * phase.training.tokens_per_step).learning_rate


@pytest.mark.parametrize("style", LR_DECAY_STYLES)
def test_warm_up_is_linear_and_reaches_the_peak(style: str) -> None:
    phase = flat(lr_decay_style=style)
    assert [rate(phase, i) for i in range(10)] == [pytest.approx((i + 1) / 10) for i in range(10)]
    assert rate(phase, 9) == rate(phase, 10) == 1.0


@pytest.mark.parametrize(("style", "at_quarter", "at_half", "end"), [
    ("cosine", 0.1 + 0.9 * 0.5 * (1 + math.sqrt(0.5)), 0.55, 0.1), ("linear", 0.775, 0.55, 0.1),
    ("constant", 1.0, 1.0, 1.0)])
def test_shape_and_end_of_the_decay(style: str, at_quarter: float, at_half: float, end: float) -> None:
    phase = flat(lr_decay_style=style)
    assert rate(phase, 35) == pytest.approx(at_quarter)
    assert rate(phase, 60) == pytest.approx(at_half)
    assert rate(phase, 109) == pytest.approx(end, abs=0.01)
    assert [rate(phase, i) for i in (110, 111, 10**6)] == [end] * 3


def test_a_decay_shorter_or_longer_than_the_run() -> None:
    shorter, longer = flat(lr_decay_style="linear", lr_decay_iters=30), flat(lr_decay_style="linear",
                                                                            lr_decay_iters=210)
    assert rate(shorter, 20) == pytest.approx(0.55)
    assert [rate(shorter, i) for i in (30, 31, 109)] == [0.1] * 3
    assert rate(longer, 110) == pytest.approx(0.55) and longer.num_steps == 110


def test_no_warm_up_and_all_warm_up() -> None:
    assert rate(flat(lr_warmup_iters=0), 0) == 1.0
    assert rate(flat(lr_warmup_iters=110), 109) == 1.0
    assert rate(flat(lr_warmup_iters=110), 110) == 0.1


def test_flat_runs_go_by_steps_bit_for_bit() -> None:
    """Keyed to tokens, the rates are those of the formula in steps."""
    training = preset("tiny").training
    for iteration, _tokens, plan in walk(preset("tiny").recipe()):
        expected = training.lr * (iteration + 1) / 30
        if iteration >= 30:
            expected = training.min_lr + (1 - (iteration - 30) / 370) * (training.lr - training.min_lr)
        assert plan.learning_rate == expected
        assert plan.global_batch_size == 8 and plan.mtp_weight == 0.3 and plan.bias_update_rate == 5e-3


@settings(max_examples=50)
@given(style=st.sampled_from(LR_DECAY_STYLES), warmup=st.integers(0, 20), decay=st.none() | st.integers(20, 60),
       peak=st.floats(1e-6, 1.0), share=st.floats(0.0, 1.0))
def test_it_never_leaves_its_bounds_and_falls_after_the_warm_up(style: str, warmup: int, decay: int | None,
                                                                peak: float, share: float) -> None:
    phase = flat(lr=peak, min_lr=peak * share, lr_warmup_iters=warmup, lr_decay_iters=decay, train_iters=50,
                 lr_decay_style=style)
    rates = [rate(phase, i) for i in range(70)]
    rounding = 1e-12 * peak
    assert all(0 <= value <= peak + rounding for value in rates)
    assert all(later >= earlier - rounding for earlier, later in itertools.pairwise(rates[:warmup]))
    assert all(peak * share - rounding <= later <= earlier + rounding
               for earlier, later in itertools.pairwise(rates[warmup:]))
