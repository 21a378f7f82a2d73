"""The learning rate at the schedule's corners, and between them."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_megatron.config.presets import PRESETS, preset
from dsv3_megatron.config.training import LR_DECAY_STYLES, TrainingConfig
from dsv3_megatron.optim.lr import learning_rate

PLAN = TrainingConfig(lr=1.0, min_lr=0.1, lr_warmup_iters=10, train_iters=110)


def with_style(style: str, **changes: object) -> TrainingConfig:
    return dataclasses.replace(PLAN, lr_decay_style=style, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("style", LR_DECAY_STYLES)
def test_warm_up_is_linear_and_reaches_the_peak(style: str) -> None:
    plan = with_style(style)
    assert [learning_rate(plan, i) for i in range(10)] == [pytest.approx((i + 1) / 10) for i in range(10)]
    assert learning_rate(plan, 9) == learning_rate(plan, 10) == 1.0


@pytest.mark.parametrize(("style", "at_quarter", "at_half"), [
    ("cosine", 0.1 + 0.9 * 0.5 * (1 + math.sqrt(0.5)), 0.55), ("linear", 0.775, 0.55), ("constant", 1.0, 1.0)])
def test_shape_of_the_decay(style: str, at_quarter: float, at_half: float) -> None:
    plan = with_style(style)
    assert learning_rate(plan, 35) == pytest.approx(at_quarter)
    assert learning_rate(plan, 60) == pytest.approx(at_half)


@pytest.mark.parametrize(("style", "end"), [("cosine", 0.1), ("linear", 0.1), ("constant", 1.0)])
def test_the_end_is_reached_and_kept(style: str, end: float) -> None:
    plan = with_style(style)
    assert learning_rate(plan, 109) == pytest.approx(end, abs=0.01)
    assert [learning_rate(plan, i) for i in (110, 111, 10**6)] == [end] * 3


def test_a_decay_shorter_than_the_run() -> None:
    plan = with_style("linear", lr_decay_iters=30)
    assert learning_rate(plan, 20) == pytest.approx(0.55)
    assert [learning_rate(plan, i) for i in (30, 31, 109)] == [0.1] * 3


def test_without_warm_up_it_starts_at_the_peak() -> None:
    assert learning_rate(with_style("cosine", lr_warmup_iters=0), 0) == 1.0


def test_a_run_that_is_all_warm_up() -> None:
    plan = with_style("cosine", lr_warmup_iters=110)
    assert learning_rate(plan, 109) == 1.0
    assert learning_rate(plan, 110) == 0.1


@settings(deadline=None, max_examples=50)
@given(style=st.sampled_from(LR_DECAY_STYLES), warmup=st.integers(0, 20), decay=st.none() | st.integers(20, 60),
       peak=st.floats(1e-6, 1.0), share=st.floats(0.0, 1.0))
def test_it_never_leaves_its_bounds_and_falls_after_the_warm_up(style: str, warmup: int, decay: int | None,
                                                                peak: float, share: float) -> None:
    plan = TrainingConfig(lr=peak, min_lr=peak * share, lr_warmup_iters=warmup, lr_decay_iters=decay, train_iters=50,
                          lr_decay_style=style)
    rates = [learning_rate(plan, i) for i in range(70)]
    rounding = 1e-12 * peak
    assert all(0 <= rate <= peak + rounding for rate in rates)
    assert all(later >= earlier - rounding for earlier, later in itertools.pairwise(rates[:warmup]))
    assert all(plan.min_lr - rounding <= later <= earlier + rounding
               for earlier, later in itertools.pairwise(rates[warmup:]))


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_go_from_a_small_rate_to_the_peak_to_the_end(name: str) -> None:
    plan = preset(name).training
    assert learning_rate(plan, 0) == pytest.approx(plan.lr / plan.lr_warmup_iters)
    assert max(learning_rate(plan, i) for i in (plan.lr_warmup_iters - 1, plan.lr_warmup_iters)) == plan.lr
    assert learning_rate(plan, plan.train_iters) == plan.min_lr
