"""Published bubbles and activation bounds against the simulation of the plans."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_megatron.schedule.formulas import activation_bound, published_bubble
from dsv3_megatron.schedule.plan import Plan, build_plan
from dsv3_megatron.schedule.simulate import simulate
from tests.unit.schedule.costs import tenths, uniform
from tests.unit.schedule.sizes import plans


@st.composite
def usual_costs(draw: st.DrawFn) -> dict[str, Fraction]:
    """W <= F <= B - W and max(F, B) <= F&B <= F + B: where every formula holds."""
    weight = draw(tenths)
    forward = weight + draw(st.integers(0, 9)) * Fraction(1, 10)
    backward = forward + draw(st.integers(0, 15)) * Fraction(1, 10) + weight
    hidden = draw(st.integers(0, 10)) * Fraction(1, 10)
    return {"forward": forward, "backward": backward, "weight": weight, "overlapped": backward + forward * hidden}


@given(st.sampled_from(("1f1b", "interleaved", "zb1p", "dualpipe", "dualpipev")), st.integers(1, 5), st.integers(0, 5),
       usual_costs())
@settings(max_examples=80)
def test_bubbles_are_the_published_ones(schedule: str, half: int, more: int, costs: dict[str, Fraction]) -> None:
    ranks = 2 * half
    microbatches = 2 * ranks + (ranks if schedule == "interleaved" else 2) * more
    plan = build_plan(schedule, num_ranks=ranks, num_microbatches=microbatches)
    result = simulate(plan, uniform(plan, **costs))
    f, b, w, fb = costs["forward"], costs["backward"], costs["weight"], costs["overlapped"]
    stages = ranks if schedule == "dualpipe" else 2 * ranks  # PP of the two
    published = {
        "1f1b": (ranks - 1) * (f + b),
        "interleaved": (ranks - 1) * (f + b),
        "zb1p": (ranks - 1) * (f + b - 2 * w),
    }.get(schedule, (Fraction(stages, 2) - 1) * (fb + b - 3 * w))
    assert max(result.bubble) == published == published_bubble(plan, **costs)
    if not schedule.startswith("dualpipe") or fb == f + b:
        assert set(result.bubble) == {published}
        assert result.step_time == result.ideal_time + published == microbatches * plan.num_chunks * (f + b) / (
            plan.num_directions) + published
    assert result.peak_activations == activation_bound(plan)


@given(plans(max_ranks=6), tenths, tenths, tenths, st.integers(0, 10))
@settings(max_examples=100)
def test_a_formula_that_is_given_holds(plan: Plan, f: Fraction, i: Fraction, w: Fraction, hidden: int) -> None:
    """For any costs: either no formula is claimed, or it is what comes out."""
    costs = {"forward": f, "backward": i + w, "weight": w,
             "overlapped": max(f, i + w) + min(f, i + w) * Fraction(hidden, 10)}
    published = published_bubble(plan, **costs)
    if published is not None:
        assert max(simulate(plan, uniform(plan, **costs)).bubble) == published


@pytest.mark.parametrize(("schedule", "costs"), [
    ("zb1p", (1, 3, 2, 4)), ("zb1p", (3, 3, 2, 6)), ("dualpipe", (2, 2, 1, 4)), ("dualpipe", (1, 2, 1, 4)),
    ("zbv", (2, 5, 1, 7))])
def test_conditions_are_needed(schedule: str, costs: tuple[int, int, int, int]) -> None:
    """Outside them the literal formula is wrong, so none is claimed."""
    plan = build_plan(schedule, num_ranks=4, num_microbatches=8)
    named = dict(zip(("forward", "backward", "weight", "overlapped"), costs, strict=True))
    f, b, w, fb = costs
    literal = fb + b - 3 * w if schedule == "dualpipe" else 3 * (f + b - 2 * w)
    assert published_bubble(plan, **named) is None
    assert max(simulate(plan, uniform(plan, **(named | {"overlapped": max(fb, b)}))).bubble) != literal


def test_zb_v_under_its_own_condition() -> None:
    plan = build_plan("zbv", num_ranks=8, num_microbatches=20)
    costs = {"forward": 3, "backward": 6, "weight": 3, "overlapped": 9}
    assert set(simulate(plan, uniform(plan, **costs)).bubble) == {21} == {published_bubble(plan, **costs)}
    short = build_plan("zbv", num_ranks=8, num_microbatches=10)
    assert published_bubble(short, **costs) is None
