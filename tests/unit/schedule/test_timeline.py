"""Plans run without a clock: times by hand, transfers that take time, and orders that come to a stop."""

from dataclasses import replace
from fractions import Fraction

import pytest

from dsv3_megatron.schedule.actions import Action, Kind, Operation
from dsv3_megatron.schedule.plan import build_plan
from dsv3_megatron.schedule.timeline import PlanError, run_in_order


def times(timeline):
    return [[(str(span.action), span.start, span.end) for span in spans] for spans in timeline]


def by_kind(forward, backward):
    return lambda _rank, action: forward if action.operations[0].kind == Kind.FORWARD else backward


PLAN = build_plan("1f1b", num_ranks=2, num_microbatches=2)


def test_two_ranks_and_two_micro_batches_by_hand():
    """A forward takes 1, a backward 2."""
    assert times(run_in_order(PLAN, by_kind(1, 2))) == [
        [("F0.0", 0, 1), ("F0.1", 1, 2), ("B0.0", 4, 6), ("B0.1", 7, 9)],
        [("F0.0", 1, 2), ("B0.0", 2, 4), ("F0.1", 4, 5), ("B0.1", 5, 7)]]


def test_a_transfer_takes_time_between_ranks_only():
    third = Fraction(1, 3)
    assert times(run_in_order(PLAN, by_kind(1, 2), delay=third)) == [
        [("F0.0", 0, 1), ("F0.1", 1, 2), ("B0.0", 4 + 2 * third, 6 + 2 * third),
         ("B0.1", 7 + 2 * third, 9 + 2 * third)],
        [("F0.0", 1 + third, 2 + third), ("B0.0", 2 + third, 4 + third), ("F0.1", 4 + third, 5 + third),
         ("B0.1", 5 + third, 7 + third)]]


def test_what_is_handed_over_early_is_used_early():
    """The last rank hands its gradient over one before its backward ends."""
    early = run_in_order(PLAN, by_kind(1, 2),
                         tail=lambda rank, action: rank * (action.operations[0].kind == Kind.BACKWARD))
    assert times(early)[0][2:] == [("B0.0", 3, 5), ("B0.1", 6, 8)]
    assert times(early)[1] == times(run_in_order(PLAN, by_kind(1, 2)))[1], "the rank itself goes on as long"


def test_an_order_that_comes_to_a_stop():
    """Each rank begins with the backward pass that needs the other's work first."""
    backward = Action((Operation(Kind.BACKWARD, 0, 0),))
    stuck = replace(PLAN, actions=((backward, *(a for a in PLAN.actions[0] if a != backward)), PLAN.actions[1]))
    with pytest.raises(PlanError, match="the plan comes to a stop: rank 0 waits for the .* before B0.0"):
        run_in_order(stuck, by_kind(1, 2))
