"""Every plan is sound for all P in 2..32; every kind of fault is found when it is planted."""

from __future__ import annotations

import random
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_megatron.schedule.actions import Action, Kind, Operation
from dsv3_megatron.schedule.formulas import activation_bound
from dsv3_megatron.schedule.plan import Output, PlacedStage, Plan, build_plan
from dsv3_megatron.schedule.timeline import PlanError
from dsv3_megatron.schedule.transfers import Program, Transfer, TransferBatch, with_transfers
from dsv3_megatron.schedule.validate import check_rendezvous, check_work, peak_activations, validate_plan
from tests.unit.schedule.sizes import FORMS, form, has_ranks, plans


@pytest.mark.parametrize("name", FORMS)
def test_every_number_of_ranks(name: str) -> None:
    for num_ranks in filter(lambda ranks: has_ranks(name, ranks), range(2, 33)):
        plan = form(name, num_ranks, 2 * num_ranks if name.startswith("dualpipe") else num_ranks)
        validate_plan(plan)
        assert plan.num_ranks == num_ranks


@given(plans())
@settings(max_examples=60)
def test_every_number_of_microbatches(plan: Plan) -> None:
    validate_plan(plan)
    enough = plan.num_microbatches >= 2 * plan.num_ranks
    if enough and not plan.is_overlapped:
        assert peak_activations(plan) == activation_bound(plan)  # the promise is no looser than need be


def test_published_activations() -> None:
    """PP / PP / PP+1, PP being the stages; and one more is not reached."""
    for num_ranks in (2, 4, 16):
        for name, published in (("1f1b", num_ranks), ("zb1p", num_ranks), ("dualpipe", num_ranks + 1),
                                ("dualpipev", 2 * num_ranks + 1)):
            for num_microbatches in (2 * num_ranks, 5 * num_ranks):
                peaks = peak_activations(form(name, num_ranks, num_microbatches))
                assert max(peaks) == published
                assert name == "1f1b" or set(peaks) == {published}


# -- planted faults ------------------------------------------------------------------------------------


def changed(plan: Plan, rank: int, change) -> Plan:
    actions = [list(own) for own in plan.actions]
    change(actions[rank])
    return replace(plan, actions=tuple(map(tuple, actions)))


def single(kind: str, chunk: int, microbatch: int) -> Action:
    return Action((Operation(Kind(kind), chunk, microbatch),))


def swap(a: int, b: int):
    def change(actions: list[Action]) -> None:
        actions[a], actions[b] = actions[b], actions[a]
    return change


PLAN = build_plan("1f1b", num_ranks=2, num_microbatches=3)  # rank 0: F0 F1 B0 F2 B1 B2; rank 1: F0 B0 F1 B1 F2 B2
SPLIT = build_plan("zb1p", num_ranks=2, num_microbatches=3)
PAIRED = build_plan("dualpipev", num_ranks=2, num_microbatches=4)


@pytest.mark.parametrize(("plan", "rank", "change", "message"), [
    (PLAN, 0, lambda actions: actions.pop(), "rank 0 runs F of chunk 0, micro-batch 2; it must be F and B, or F, I and "
                                             "W"),
    (PLAN, 1, lambda actions: actions.append(actions[0]), "rank 1 runs F0.0 twice"),
    (PLAN, 1, lambda actions: actions.append(single("F", 1, 0)), "rank 1 runs F1.0; it has chunks 0..0 and "
                                                                 "micro-batches 0..2 of each"),
    (PLAN, 1, lambda actions: actions.append(single("F", 0, 3)), "rank 1 runs F0.3; it has"),
    (PLAN, 1, swap(0, 1), "rank 1 runs B0.0 before F0.0"),
    (PLAN, 1, lambda actions: actions.append(single("W", 0, 0)), "rank 1 runs W0.0 before I0.0"),
    (SPLIT, 1, lambda actions: actions.pop(), "rank 1 runs F, I of chunk 0, micro-batch 2"),
    (SPLIT, 1, lambda actions: actions.append(single("B", 0, 1)), "rank 1 runs F, I, W, B of chunk 0, micro-batch 1"),
    (PAIRED, 0, lambda actions: actions.__setitem__(0, Action(actions[0].operations + actions[1].operations)),
     "rank 0 runs F0.0 & F0.1 at once; only a forward and a full backward overlap"),
    (PLAN, 1, lambda actions: actions.__setitem__(slice(0, 2), [Action(actions[0].operations + actions[1].operations)]),
     "rank 1 runs B0.0 before F0.0"),  # a pair of one micro-batch with itself
    (PLAN, 0, swap(1, 2), None),  # B0 before F1: less in flight, still sound
    (PLAN, 0, swap(2, 3), "rank 0 holds the activations of 3 chunks at once; 1f1b with 2 ranks promises 2"),
])
def test_planted_in_a_plan(plan: Plan, rank: int, change, message: str | None) -> None:
    validate_plan(plan)
    planted = changed(plan, rank, change)
    if message is None:
        validate_plan(planted)
        return
    with pytest.raises(PlanError, match=re.escape(message)):
        validate_plan(planted)


def test_orders_that_wait_for_each_other() -> None:
    """Rank 0 wants the gradient of 1 before that of 0 and rank 1 makes them the other way round, one at a time."""
    planted = changed(PLAN, 0, lambda actions: actions.__setitem__(slice(None), [
        single(*word) for word in (("F", 0, 0), ("B", 0, 0), ("F", 0, 1), ("B", 0, 1), ("F", 0, 2), ("B", 0, 2))]))
    planted = changed(planted, 1, lambda actions: actions.__setitem__(slice(None), [
        single(*word) for word in (("F", 0, 0), ("F", 0, 1), ("B", 0, 0), ("B", 0, 1), ("F", 0, 2), ("B", 0, 2))]))
    check_work(planted)
    with pytest.raises(PlanError, match=re.escape(
            "the plan comes to a stop: rank 0 waits for the gradient of stage 1, micro-batch 0 before B0.0; "
            "rank 1 waits for the output of stage 0, micro-batch 1 before F0.1")):
        validate_plan(planted)


def test_a_stage_held_twice() -> None:
    planted = replace(PLAN, placement=((PlacedStage(0, 0),), (PlacedStage(0, 0),)))
    with pytest.raises(PlanError, match="must each be held by one rank"):
        validate_plan(planted)


def test_rendezvous_deadlock_is_found() -> None:
    """The classic one: both send first, and neither send is done before the other side receives."""
    plan = build_plan("1f1b", num_ranks=2, num_microbatches=2)
    forward, gradient = Transfer(0, 1, Output(False, 0, 0, 1)), Transfer(1, 0, Output(True, 0, 1, 0))
    first, last = Transfer(0, 1, Output(False, 0, 0, 0)), Transfer(1, 0, Output(True, 0, 1, 1))
    f0, f1, b0, b1 = single("F", 0, 0), single("F", 0, 1), single("B", 0, 0), single("B", 0, 1)

    def programs(*middle: tuple[TransferBatch, ...]) -> list[Program]:
        return [(f0, TransferBatch((first,)), f1, *middle[0], b0, TransferBatch((last,)), b1),
                (TransferBatch((first,)), f0, b0, *middle[1], f1, b1, TransferBatch((last,)))]

    together = (TransferBatch((forward, gradient)),)
    check_rendezvous(plan, programs(together, together))
    with pytest.raises(PlanError, match=re.escape(
            "deadlock: rank 0 waits for rank 1 with the output of stage 0, micro-batch 1; "
            "rank 1 waits for rank 0 with the gradient of stage 1, micro-batch 0")):
        check_rendezvous(plan, programs((TransferBatch((forward,)), TransferBatch((gradient,))),
                                        (TransferBatch((gradient,)), TransferBatch((forward,)))))


def test_transfers_that_do_not_meet() -> None:
    plan = build_plan("1f1b", num_ranks=2, num_microbatches=3)
    sound = with_transfers(plan)
    exchanges = [index for index, own in enumerate(sound[1]) if isinstance(own, TransferBatch)]
    lost = tuple(own for index, own in enumerate(sound[1]) if index != exchanges[-1])
    with pytest.raises(PlanError, match="rank 1 sends rank 0 2 transfers and that expects 3; number 2 is the none"):
        check_rendezvous(plan, (sound[0], lost))
    late = tuple(sorted(sound[1], key=lambda own: isinstance(own, TransferBatch)))
    with pytest.raises(PlanError, match=r"rank 1 runs F0\.0 before it has the output of stage 0, micro-batch 0"):
        check_rendezvous(plan, (sound[0], late))
    early = tuple(sorted(sound[0], key=lambda own: not isinstance(own, TransferBatch)))
    with pytest.raises(PlanError, match="rank 0 sends the output of stage 0, micro-batch 0 before it has made it"):
        check_rendezvous(plan, (early, sound[1]))


@given(plans(max_ranks=6), st.randoms(use_true_random=False))
@settings(max_examples=40)
def test_disturbed_plans_never_pass_unnoticed(plan: Plan, choice: random.Random) -> None:
    """A plan with two actions of a rank exchanged either breaks a rule or still runs under blocking transfers."""
    rank = choice.randrange(plan.num_ranks)
    first, second = choice.randrange(len(plan.actions[rank])), choice.randrange(len(plan.actions[rank]))
    planted = changed(plan, rank, swap(first, second))
    try:
        check_work(planted)
        programs = with_transfers(planted)
    except PlanError:
        return
    check_rendezvous(planted, programs)  # the ticks' argument holds for any order that is sound as data flow


@given(plans(max_ranks=8))
@settings(max_examples=30)
def test_transfers(plan: Plan) -> None:
    """Every output that another rank waits for is sent once, to that rank; nothing else is."""
    expected = 0
    per_direction = plan.microbatches_per_chunk
    for place, rank in plan.holders.items():
        follower = plan.holders.get(PlacedStage(place.direction, place.stage + 1))
        expected += 2 * per_direction * (follower not in (None, rank))
    programs = with_transfers(plan)
    sent = [transfer for rank, program in enumerate(programs) for own in program if isinstance(own, TransferBatch)
            for transfer in own.transfers if transfer.source == rank]
    assert len(sent) == len(set(sent)) == expected
    assert all(tuple(own for own in program if isinstance(own, Action)) == plan.actions[rank]
               for rank, program in enumerate(programs))


def test_both_sides_have_one_order() -> None:
    """A pair sends two transfers to one rank at once; which is which, only the order tells."""
    plan = build_plan("dualpipe", num_ranks=4, num_microbatches=8)
    programs = with_transfers(plan)
    check_rendezvous(plan, programs)
    reversed_on_odd = [program if rank % 2 else tuple(
        TransferBatch(own.transfers[::-1]) if isinstance(own, TransferBatch) else own for own in program)
        for rank, program in enumerate(programs)]
    with pytest.raises(PlanError, match="is the gradient of .* to the one and the output of .* to the other"):
        check_rendezvous(plan, reversed_on_odd)
