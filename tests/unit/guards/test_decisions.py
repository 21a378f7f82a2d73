"""What follows from findings: counters, the end of a run, rollbacks and their jumps, state that survives JSON."""

from __future__ import annotations

import json
import math

import pytest

from dsv3_megatron.config.guards import GuardConfig
from dsv3_megatron.guards.decisions import Guard
from tests.unit.guards.judged import NONFINITE, NOTHING, SPIKE, guard


@pytest.mark.parametrize("losses, grad_norm, reasons", [
    ({"lm loss": math.nan}, 1.0, ("lm loss is nan",)),
    ({"lm loss": 2.0, "mtp_1 loss": math.inf}, 1.0, ("mtp_1 loss is inf",)),
    ({"lm loss": 2.0, "balance loss": -math.inf}, math.nan, ("balance loss is -inf", "grad norm is nan")),
])
def test_anything_that_is_not_finite_is_found(losses: dict[str, float], grad_norm: float, reasons: tuple) -> None:
    judgement = guard().judge(losses, grad_norm)
    assert judgement.finding is NONFINITE and judgement.reasons == reasons


def test_judging_changes_nothing_and_finds_spikes() -> None:
    made = guard()
    before = made.state_dict()
    assert made.judge({"lm loss": 2.0}, 1.0).finding is NOTHING
    judgement = made.judge({"lm loss": 9.0}, 50.0)
    assert judgement.finding is SPIKE and len(judgement.reasons) == 2
    assert made.state_dict() == before


@pytest.mark.parametrize("on_spike", ["log", "skip", "rollback"])
def test_a_step_that_is_not_finite_is_never_applied_and_enters_no_window(on_spike: str) -> None:
    made = guard(on_spike=on_spike)
    window = made.detector.window
    assert not made.decide(NONFINITE, math.nan, math.nan)
    assert made.detector.window == window and made.counters.skipped == 1 and not made.must_roll_back


def test_too_many_skips_in_a_row_end_the_run() -> None:
    made = guard(on_spike="skip", max_consecutive_skips=2)
    for finding in (NONFINITE, SPIKE, NOTHING, SPIKE, SPIKE):
        made.decide(finding, 9.0, 1.0)
    assert made.end_reason is None and made.counters.consecutive_skips == 2
    made.decide(NONFINITE, math.nan, 1.0)
    assert made.end_reason == "3 updates in a row were left out (max_consecutive_skips=2)"
    assert guard(max_consecutive_skips=0).decide(NONFINITE, 1.0, math.nan) is False


def test_logged_spikes_are_applied_and_do_not_end_a_run() -> None:
    made = guard(on_spike="log", max_consecutive_skips=0)
    assert all(made.decide(SPIKE, 9.0, 1.0) for _ in range(20))
    assert made.end_reason is None and made.counters.spikes == 20 and made.counters.skipped == 0


def test_a_rollback_takes_the_saved_window_and_jumps() -> None:
    made = guard(on_spike="rollback", max_rollbacks=2)
    saved = json.loads(json.dumps(made.state_dict()))
    made.decide(NONFINITE, math.nan, 1.0)
    made.decide(NOTHING, 2.1, 1.1)
    assert not made.decide(SPIKE, 9.0, 1.0) and made.must_roll_back
    made.rolled_back(saved, first_sample=16, next_sample=28)
    assert not made.must_roll_back and made.jumped_samples == 12 and made.end_reason is None
    assert made.state_dict()["detector"] == saved["detector"], "what lies after the checkpoint is not in the window"
    assert (made.counters.skipped, made.counters.rollbacks) == (2, 1), "what has happened stays counted"
    again = Guard(made.config)
    again.load_state_dict(json.loads(json.dumps(made.state_dict())))
    assert again.state_dict() == made.state_dict() and again.jumped_samples == 12
    again.decide(SPIKE, 9.0, 1.0)
    again.rolled_back({}, first_sample=28, next_sample=40)  # a checkpoint of weights alone
    assert again.detector.window == [] and again.counters.jumps == [(16, 28), (28, 40)]
    again.decide(SPIKE, 9.0, 1.0)
    assert again.end_reason == "a spike after 2 rollbacks (max_rollbacks=2)"
    assert not again.must_roll_back


def test_a_checkpoint_without_guards_leaves_a_fresh_guard() -> None:
    made = Guard(GuardConfig())
    made.load_state_dict({})
    assert made.state_dict() == Guard(GuardConfig()).state_dict()


def test_a_smaller_window_keeps_the_last_steps() -> None:
    made = guard()
    made.decide(NOTHING, 2.5, 1.5)
    small = Guard(GuardConfig(spike_min_steps=2, spike_window=2))
    small.load_state_dict(made.state_dict())
    assert small.detector.window == [(2.0, 1.0), (2.5, 1.5)]
