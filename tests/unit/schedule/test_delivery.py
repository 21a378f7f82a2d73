"""No plan hangs on a GPU's communicators with one of them for each edge; with two for all of a pipeline most do."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_megatron.schedule.actions import Action
from dsv3_megatron.schedule.delivery import (
    FIRST_CONTACT,
    ONE_STREAM,
    STRICTEST,
    Delivery,
    check_delivery,
    own_communicator,
)
from dsv3_megatron.schedule.plan import Plan, build_plan, forward_plan
from dsv3_megatron.schedule.timeline import PlanError
from dsv3_megatron.schedule.transfers import (
    MAX_UNFINISHED_SENDS,
    Receive,
    Send,
    edges_of,
    issue_order,
    rounds_of_meetings,
    with_transfers,
)
from dsv3_megatron.schedule.validate import validate_plan
from tests.unit.schedule.sizes import FORMS, form, has_ranks, plans
from tests.unit.schedule.stream_simulation import Simulation, Word


def two_communicators(source: int, destination: int) -> bool:
    """The transport as it was: one communicator for what goes to higher ranks, one for what goes to lower ones."""
    return source < destination


def hangs(plan: Plan, delivery: Delivery, **settings) -> bool:
    try:
        check_delivery(plan, with_transfers(plan), delivery, **settings)
    except PlanError as error:
        assert f"deadlock by the rules of {delivery.name}: " in str(error)
        return True
    return False


@given(plans(max_ranks=7))
@settings(max_examples=500, deadline=None)
def test_no_plan_hangs_with_a_communicator_for_each_edge(plan: Plan) -> None:
    """500 random plans by the rules of nccl2, of the older backend, and by the sum of both."""
    programs = with_transfers(plan)
    for delivery in (ONE_STREAM, FIRST_CONTACT, STRICTEST):
        check_delivery(plan, programs, delivery)


@pytest.mark.parametrize("name", FORMS)
def test_no_forward_plan_hangs(name: str) -> None:
    """A validation runs forward passes alone, over some of the edges."""
    for num_ranks in (2, 4, 7, 8):
        if has_ranks(name, num_ranks):
            check = forward_plan(name.removesuffix(" with pairs"), num_ranks=num_ranks, num_microbatches=6)
            check_delivery(check, with_transfers(check))


# -- the transport as it was ---------------------------------------------------------------------------

# By form: the fewest ranks with which two communicators hang by the rules of nccl2, of 2, 4, 8, 16 with twice as many
# micro-batches.
HANGS_FROM = {"1f1b": 4, "interleaved": 4, "zb1p": 8, "dualpipe": 4, "dualpipev": 4, "zbv": 8,
              "interleaved with pairs": 4}
# And by the rules of the older backend.
HANGS_AT_CONTACT = {"1f1b", "zb1p", "dualpipe"}


@pytest.mark.parametrize("name", FORMS)
def test_two_communicators_hang(name: str) -> None:
    """With 4 ranks or more; no schedule escapes with 16."""
    for num_ranks in (2, 4, 8, 16):
        plan = form(name, num_ranks, 2 * num_ranks)
        found = hangs(plan, ONE_STREAM, communicator=two_communicators, meetings=[])
        assert found == (num_ranks >= HANGS_FROM[name]), num_ranks
        if num_ranks == 4:
            found = hangs(plan, FIRST_CONTACT, communicator=two_communicators, meetings=[])
            assert found == (name in HANGS_AT_CONTACT)


def test_what_hangs_is_told() -> None:
    plan = build_plan("1f1b", num_ranks=2, num_microbatches=4)
    with pytest.raises(PlanError, match=re.escape(
            "deadlock by the rules of first contact: rank 0's host at the gradient of stage 1, micro-batch 0, from "
            "rank 1 to rank 0, which waits for rank 1's host at the output of stage 0, micro-batch 0, from rank 0 to "
            "rank 1, which waits for the former")):
        check_delivery(plan, with_transfers(plan), FIRST_CONTACT, meetings=[])


def test_edges_need_their_meeting() -> None:
    """Without the first messages in rounds, a communicator for each edge hangs too by the older backend's rules."""
    plan = build_plan("1f1b", num_ranks=4, num_microbatches=8)
    assert hangs(plan, FIRST_CONTACT, meetings=[]) and not hangs(plan, FIRST_CONTACT)


# -- meetings ------------------------------------------------------------------------------------------


@given(plans(max_ranks=12))
@settings(max_examples=60, deadline=None)
def test_every_edge_is_met_once_and_no_rank_twice_in_a_round(plan: Plan) -> None:
    rounds = rounds_of_meetings(edges_of(plan.placement))
    met = [edge for edges in rounds for edge in edges]
    used = {(item.transfer.source, item.transfer.destination) for rank, program in enumerate(with_transfers(plan))
            for item in issue_order(program, rank) if isinstance(item, Send)}
    assert sorted(met) == sorted(used)
    for edges in rounds:
        assert max(Counter(rank for edge in edges for rank in edge).values()) == 1
    assert len(rounds) <= 6


# -- a second opinion ----------------------------------------------------------------------------------


def words(plan: Plan, rank: int, order, meetings) -> list[Word]:
    """What a rank issues, for the simulation."""
    found: list[Word] = []
    for edge in meetings:
        if rank in edge:
            found += [("put" if rank == edge[0] else "take", edge), ("wait", edge)]
    arrivals, sent = {}, {}
    for item in order:
        if isinstance(item, Action):
            operands = [plan.operand(rank, operation) for operation in item.operations]
            found += [("wait", arrivals[operand]) for operand in operands if operand in arrivals]
            found.append(("run",))
        elif isinstance(item, Receive):
            arrivals[item.transfer.output] = item.transfer
            found.append(("take", item.transfer))
        else:
            to = sent.setdefault(item.transfer.destination, [])
            to.append(item.transfer)
            found.append(("put", item.transfer))
            if len(to) > MAX_UNFINISHED_SENDS:
                found.append(("wait", to[-1 - MAX_UNFINISHED_SENDS]))
    return found + [("wait", transfer) for to in sent.values() for transfer in to[-MAX_UNFINISHED_SENDS:]]


@given(plans(max_ranks=5), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_the_simulation_agrees(plan: Plan, choice: random.Random) -> None:
    """Whatever the communicators, the first messages and the rules: both find that it hangs, or that it does not."""
    edges = edges_of(plan.placement)
    # Any number of communicators, each with any of the edges.
    names = {edge: choice.randrange(1 + len(edges)) for edge in edges}
    communicator = choice.choice([own_communicator, two_communicators, lambda *edge: names[edge]])
    meetings = [edge for own in rounds_of_meetings(edges) for edge in own]
    choice.shuffle(meetings)
    meetings = meetings[:choice.choice([0, len(meetings), choice.randrange(1 + len(meetings))])]
    delivery = Delivery("", *(choice.random() < 0.5 for _ in range(3)))
    ahead = choice.randrange(4)
    orders = [issue_order(program, rank, ahead) for rank, program in enumerate(with_transfers(plan))]
    simulation = Simulation([words(plan, rank, order, meetings) for rank, order in enumerate(orders)], communicator,
                            per_pair=delivery.has_stream_per_pair, blocks=delivery.blocks_on_first_contact,
                            waits=delivery.waits_for_device, choice=choice)
    assert simulation.ends() != hangs(plan, delivery, communicator=communicator, meetings=meetings,
                                      receive_ahead=ahead)


def test_validation_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan is proved in this world too."""
    plan = build_plan("1f1b", num_ranks=4, num_microbatches=8)
    validate_plan(plan)
    monkeypatch.setattr("dsv3_megatron.schedule.validate.check_delivery",
                        lambda plan, programs: check_delivery(plan, programs, replace(STRICTEST, name="planted"),
                                                              communicator=two_communicators))
    with pytest.raises(PlanError, match="deadlock by the rules of planted: "):
        validate_plan(plan)
