"""Simulated times against the published formulas, exactly, and against relaxation to the least feasible times."""

from __future__ import annotations

import dataclasses
import re
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.schedule.plan import Plan, build_plan
from dsv3_megatron.schedule.simulate import Costs, StageCosts, simulate
from tests.unit.schedule.costs import tenths, uniform
from tests.unit.schedule.sizes import FORMS, plans

# -- the published formulas ----------------------------------------------------------------------------


def test_a_ranks_wait_does_not_grow_with_microbatches() -> None:
    costs = {"forward": 3, "backward": 7, "weight": 2, "overlapped": 8}
    for schedule in ("1f1b", "interleaved", "zb1p", "zbv", "dualpipe", "dualpipev"):
        bubbles = {simulate(plan, uniform(plan, **costs)).bubble for plan in (
            build_plan(schedule, num_ranks=4, num_microbatches=number) for number in (8, 16, 48))}
        assert len(bubbles) == 1, schedule


# -- an independent simulation -------------------------------------------------------------------------


def least_times(plan: Plan, costs: Costs) -> dict[tuple[int, int], Fraction]:
    """Start of every action by relaxation: from zero, push each one until no constraint is broken."""
    seconds = {}
    for rank, actions in enumerate(plan.actions):
        for index, action in enumerate(actions):
            where = [costs.stages[plan.placement[rank][o.chunk].stage] for o in action.operations]
            if len(where) == 2:
                seconds[rank, index] = costs.overlapped
            else:
                own = where[0]
                seconds[rank, index] = {"F": own.forward, "B": own.backward, "W": own.weight,
                                        "I": own.backward - own.weight}[action.operations[0].kind]
    maker, tails = {}, {}
    for rank, actions in enumerate(plan.actions):
        for index, action in enumerate(actions):
            tails[rank, index] = sum(costs.stages[plan.placement[rank][chunk].stage].weight_tail
                                     for kind, chunk, _ in action.operations if kind == "B")
            for kind, chunk, microbatch in action.operations:
                maker["B" if kind == "I" else kind, plan.placement[rank][chunk], microbatch] = (rank, index)
    edges = []
    for rank, actions in enumerate(plan.actions):
        for index, action in enumerate(actions):
            if index:
                edges.append(((rank, index - 1), (rank, index), 0))
            for kind, chunk, microbatch in action.operations:
                direction, stage = plan.placement[rank][chunk]
                step = {"F": -1, "I": 1, "B": 1}.get(kind, None)
                if step is not None and 0 <= stage + step < plan.num_stages:
                    source = maker["F" if kind == "F" else "B", (direction, stage + step), microbatch]
                    delay = costs.p2p_of_boundary.get(min(stage, stage + step), costs.p2p)
                    edges.append((source, (rank, index), (delay if source[0] != rank else 0) - tails[source]))
    starts = dict.fromkeys(seconds, Fraction(0))
    is_moving = True
    while is_moving:
        is_moving = False
        for source, target, delay in edges:
            earliest = starts[source] + seconds[source] + delay
            if earliest > starts[target]:
                starts[target], is_moving = earliest, True
    return starts


@given(plans(max_ranks=4), st.data())
@settings(max_examples=40)
def test_times_are_the_least_feasible(plan: Plan, data: st.DataObject) -> None:
    def stage() -> StageCosts:
        weight, more, forward = (data.draw(tenths) for _ in range(3))
        return StageCosts(forward, weight + more, weight, weight_tail=weight * data.draw(st.sampled_from((0, 1))) / 2)

    costs = Costs(tuple(stage() for _ in range(plan.num_stages)), overlapped=Fraction(10), p2p=data.draw(tenths),
                  p2p_of_boundary=data.draw(st.dictionaries(st.integers(0, plan.num_stages), tenths)))
    result = simulate(plan, costs)
    starts = least_times(plan, costs)
    assert {(rank, index): span.start for rank, spans in enumerate(result.timeline)
            for index, span in enumerate(spans)} == starts
    assert result.step_time == max(span.end for spans in result.timeline for span in spans)
    for rank, spans in enumerate(result.timeline):
        idle = result.step_time - sum(span.end - span.start for span in spans)
        assert result.bubble[rank] == idle
    assert result.ideal_time == result.step_time - min(result.bubble)


# -- what else costs time and memory -------------------------------------------------------------------


def test_all_to_all_hides_in_pairs_only() -> None:
    """Compute and all-to-all equally long: a pair takes as long as its compute, single chunks take both."""
    half = StageCosts(forward=2, backward=4, weight=1, all_to_all_forward=1, all_to_all_backward=2)
    plan = build_plan("dualpipe", num_ranks=2, num_microbatches=8)
    spans = [span for own in simulate(plan, Costs((half, half))).timeline for span in own]
    assert {span.end - span.start for span in spans if span.action.is_overlapped} == {3}
    longer = StageCosts(forward=5, backward=9, weight=1, all_to_all_forward=4, all_to_all_backward=7)
    spans = [span for own in simulate(plan, Costs((longer, longer))).timeline for span in own]
    assert {span.end - span.start for span in spans if span.action.is_overlapped} == {11}  # the all-to-all shows
    assert 5 in {span.end - span.start for span in spans}


@pytest.mark.parametrize("tail", [0, Fraction(1, 2), 1])
def test_a_gradient_handed_on_early_shortens_the_way_back(tail: int | Fraction) -> None:
    """Of 1F1B: every rank but the last to work keeps its tail to itself."""
    ranks, microbatches = 4, 6
    stage = StageCosts(forward=1, backward=2, weight=1, weight_tail=tail)
    plan = build_plan("1f1b", num_ranks=ranks, num_microbatches=microbatches)
    result = simulate(plan, Costs((stage,) * ranks))
    assert result.step_time == (microbatches + ranks - 1) * 3 - (ranks - 1) * tail
    assert result.ideal_time == 3 * microbatches


def test_measured_pairs() -> None:
    stage = StageCosts(forward=1, backward=2, weight=1)
    plan = build_plan("dualpipe", num_ranks=2, num_microbatches=8)
    measured = {(0, 1): Fraction(5, 2), (1, 0): Fraction(11, 4)}
    result = simulate(plan, Costs((stage, stage), overlapped=measured))
    found = {span.end - span.start for own in result.timeline for span in own if span.action.is_overlapped}
    assert found == set(measured.values())
    with pytest.raises(ConfigError, match=r"overlapped has no cost of stage 1's forward with stage 0's backward"):
        simulate(plan, Costs((stage, stage), overlapped={(0, 1): 3}))
    with pytest.raises(ConfigError, match=r"overlapped has the pair \[0, 2\]; the plan has stages 0\.\.1"):
        simulate(plan, Costs((stage, stage), overlapped={(0, 2): 3}))


def test_a_boundary_has_its_own_transfer_time() -> None:
    """1F1B of one micro-batch on three ranks: forward and back over both boundaries."""
    plan = build_plan("1f1b", num_ranks=3, num_microbatches=1)
    costs = dataclasses.replace(uniform(plan, forward=1, backward=2, weight=1, p2p=10), p2p_of_boundary={1: 30})
    assert simulate(plan, costs).step_time == 3 * (1 + 2) + 2 * (10 + 30)
    with pytest.raises(ConfigError, match=re.escape("p2p_of_boundary[1]=-1 must not be negative; try 0")):
        simulate(plan, dataclasses.replace(costs, p2p_of_boundary={1: -1}))


def test_transfers_cost_only_between_ranks() -> None:
    """One micro-batch through ZB-V on two ranks: four stages each way, two transfers each way, none at the fold.

    The fold's rank runs a weight part before it goes on to its other chunk, and rank 0 ends with one.
    """
    plan = build_plan("zbv", num_ranks=2, num_microbatches=1)
    result = simulate(plan, uniform(plan, forward=1, backward=2, weight=1, p2p=10))
    assert result.step_time == (4 + 2 * 10) + (4 + 2 * 10) + 2


def test_optimizer_waits_for_all_and_is_no_bubble() -> None:
    stages = tuple(StageCosts(1, 2, 1, optimizer=cost) for cost in (5, 3, 2, 7))
    plan = build_plan("dualpipev", num_ranks=2, num_microbatches=4)
    without = simulate(plan, uniform(plan, forward=1, backward=2, weight=1))
    result = simulate(plan, Costs(stages, overlapped=3))
    assert result.step_time == without.step_time + 12  # rank 0 holds stages 0 and 3
    assert result.bubble == (without.bubble[0], without.bubble[1] + 12 - 5)


def test_activations_and_parameters_by_size() -> None:
    """A first stage that keeps twice as much, a last one that holds half as much again."""
    stages = (StageCosts(1, 2, 1, activation=2), StageCosts(1, 2, 1, parameters=Fraction(3, 2)))
    plan = build_plan("1f1b", num_ranks=2, num_microbatches=3)
    result = simulate(plan, Costs(stages))
    assert result.peak_activations == (4, 1)
    assert result.parameters == (1, Fraction(3, 2))
    assert result.activations[0] == ((0, 0), (0, 2), (1, 4), (6, 2), (6, 4), (9, 2), (12, 0))
    both = simulate(build_plan("dualpipe", num_ranks=2, num_microbatches=4), Costs(stages, overlapped=3))
    assert both.parameters == (Fraction(5, 2),) * 2  # each rank holds both stages, of one direction each


@pytest.mark.parametrize("name", FORMS)
def test_uneven_stages_wait_for_the_slowest(name: str) -> None:
    plan = build_plan(name.removesuffix(" with pairs"), num_ranks=4, num_microbatches=16,
                      is_overlapped=name.endswith("pairs"))
    even = uniform(plan, forward=1, backward=2, weight=1)
    slow = Costs((*even.stages[:-1], StageCosts(2, 4, 2)), overlapped=None)
    result = simulate(plan, slow)
    last = next(rank for place, rank in plan.holders.items() if place.stage == plan.num_stages - 1)
    assert result.bubble[last] == min(result.bubble)
    assert result.ideal_time > simulate(plan, even).ideal_time


@pytest.mark.parametrize(("costs", "message"), [
    ({"forward": 0}, "stage 0: forward=0 must be greater than 0; try 1"),
    ({"backward": -2}, "stage 0: backward=-2 must be greater than 0"),
    ({"weight": float("nan")}, "stage 0: weight=nan must be a finite number"),
    ({"weight": 2}, "stage 0: weight=2 must be less than backward=2, of which it is a part; try 1"),
    ({"overlapped": 0}, "overlapped=0 must be greater than 0"),
    ({"overlapped": 1.5}, "overlapped=1.5 must be at least 2, the longer of the forward and the backward that it "
                          "contains; try 2 for perfect hiding, 3 for none"),
    ({"p2p": -1}, "p2p=-1 must not be negative; try 0"),
    ({"p2p": float("inf")}, "p2p=inf must be a finite number"),
])
def test_impossible_costs(costs: dict[str, float], message: str) -> None:
    plan = build_plan("dualpipe", num_ranks=2, num_microbatches=4)
    with pytest.raises(ConfigError, match=re.escape(message)):
        simulate(plan, uniform(plan, **{"forward": 1, "backward": 2, "weight": 1} | costs))


@pytest.mark.parametrize(("stages", "message"), [
    ([StageCosts(1, 2, 1)], "stages has the costs of 1 stages; the plan has 2"),
    ([StageCosts(1, 2, 1), StageCosts(1, 2, 1, all_to_all_forward=1)],
     "stage 1: all_to_all_forward=1 must be less than forward=1"),
    ([StageCosts(1, 2, 1), StageCosts(1, 2, 1, all_to_all_backward=1.5)],
     "stage 1: all_to_all_backward=1.5 must be less than backward - weight=1"),
    ([StageCosts(1, 2, 1), StageCosts(1, 2, 1, weight_tail=2)],
     "stage 1: weight_tail=2 must be at most weight=1, of which it is a part; try 1"),
    ([StageCosts(1, 2, 1), StageCosts(1, 2, 1, optimizer=-1)], "stage 1: optimizer=-1 must not be negative"),
])
def test_impossible_stages(stages: list[StageCosts], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        simulate(build_plan("1f1b", num_ranks=2, num_microbatches=4), Costs(tuple(stages)))
