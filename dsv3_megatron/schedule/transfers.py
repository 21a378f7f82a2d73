"""The order in which ranks send and receive, so that no rank ever blocks for good.

The strictest point-to-point semantics: a rank hands a batch of sends and receives to its transport and computes no
further until all of it is done, and a send is done only when the other side has posted its receive (rendezvous). An
order of actions that is sound as data flow can still deadlock under it: two ranks, each in a batch that the other will
reach only later.

What is posted when is decided here by a clock that all ranks share. Suppose every action takes one tick. Then every
rank is between two actions at every tick, and an output made by an action that ends at tick t is sent, and received, in
both ranks' batch of tick t. A rank's batches have ascending ticks and a transfer has one tick, so waiting goes from
earlier ticks to later ones only and cannot go round. The argument needs no property of a schedule. The ticks leave the
plan with each rank's order of actions and batches; durations no longer matter.

An executor is free to post a batch and wait for it later, as long as it keeps each rank's order: whatever it waits for
is then done no later than here. `validate` runs the strict form. What the executor makes of that freedom is
`issue_order`, which `delivery` runs by the rules of the backends that carry the messages.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from dsv3_megatron.parallel.placement import Placement
from dsv3_megatron.schedule.actions import Action
from dsv3_megatron.schedule.plan import Output, Plan
from dsv3_megatron.schedule.timeline import run_in_order

# What an executor makes of that freedom. Receives are posted this many actions before the one that follows them.
RECEIVE_AHEAD = 2
# Unfinished sends to a rank before the oldest is waited for. gloo does not say when a send is done unless it is waited
# for, so there it is this that lets go of sent tensors; a plan's ranks are never that far apart.
MAX_UNFINISHED_SENDS = 4


class Transfer(NamedTuple):
    """An output on its way from the rank that made it to the one that waits for it."""

    source: int
    destination: int
    output: Output

    def __str__(self) -> str:
        return f"{self.output}, from rank {self.source} to rank {self.destination}"


@dataclass(frozen=True, slots=True)
class TransferBatch:
    """Transfers that a rank posts together and waits for together, in the order that both sides use."""

    transfers: tuple[Transfer, ...]


@dataclass(slots=True)
class _Tick:
    transfers: list[Transfer] = field(default_factory=list)
    action: Action | None = None


Program = tuple[Action | TransferBatch, ...]


def with_transfers(plan: Plan) -> tuple[Program, ...]:
    """Every rank's actions with its exchanges between them. What stays on a rank is not transferred.

    Returns:
        By rank: actions and exchanges in the order in which the rank comes to them.

    Raises:
        PlanError: the plan comes to a stop whatever the transport.
    """
    ticks: list[dict[int, _Tick]] = [{} for _ in range(plan.num_ranks)]
    for rank, spans in enumerate(run_in_order(plan, lambda _rank, _action: 1)):
        for span in spans:
            ticks[rank].setdefault(int(span.start), _Tick()).action = span.action
            for operation in span.action.operations:
                output = plan.output(rank, operation)
                destination = None if output is None else plan.receiver(output)
                if output is None or destination is None or destination == rank:
                    continue
                for side in (rank, destination):
                    ticks[side].setdefault(int(span.end), _Tick()).transfers.append(Transfer(rank, destination, output))
    return tuple(_program(own) for own in ticks)


def _program(ticks: dict[int, _Tick]) -> Program:
    steps: list[Action | TransferBatch] = []
    for _, tick in sorted(ticks.items()):
        if tick.transfers:
            steps.append(TransferBatch(tuple(sorted(tick.transfers))))
        if tick.action is not None:
            steps.append(tick.action)
    return tuple(steps)


@dataclass(frozen=True, slots=True)
class Send:
    """Begin to send what was made; nobody waits for its end here."""

    transfer: Transfer


@dataclass(frozen=True, slots=True)
class Receive:
    """Be ready for what another rank sends; the action that uses it waits for it."""

    transfer: Transfer


Issued = Action | Send | Receive


def issue_order(program: Program, rank: int, receive_ahead: int = RECEIVE_AHEAD) -> tuple[Issued, ...]:
    """Everything that a rank hands to its device and its transport in one step, in the order in which it does so.

    Args:
        program: Actions and exchanges of the rank, from `with_transfers`.
        rank: Pipeline rank whose program it is.
        receive_ahead: Actions by which a receive goes before its place.
    """
    places = deque(_places_of_receives(program, rank))
    issued: list[Issued] = []
    num_actions = 0
    for step in program:
        if isinstance(step, TransferBatch):
            issued += [Send(transfer) for transfer in step.transfers if transfer.source == rank]
            continue
        while places and places[0][0] <= num_actions + receive_ahead:
            issued.append(Receive(places.popleft()[1]))
        issued.append(step)
        num_actions += 1
    assert not places, "an action follows every receive"
    return tuple(issued)


def _places_of_receives(program: Program, rank: int) -> Iterator[tuple[int, Transfer]]:
    """The receives of a rank in order, each with the number of actions before its place."""
    num_actions = 0
    for step in program:
        if isinstance(step, Action):
            num_actions += 1
        else:
            yield from ((num_actions, transfer) for transfer in step.transfers if transfer.destination == rank)


Edge = tuple[int, int]  # pipeline ranks: where a message comes from, where it goes


def edges_of(placement: Placement) -> tuple[Edge, ...]:
    """The pairs of ranks between which outputs go, a pair for each way, in ascending order.

    Args:
        placement: Stages of every rank. Outputs go from a stage to the next, gradients back.
    """
    holders = {place: rank for rank, places in enumerate(placement) for place in places}
    steps = [(holders[a], holders[b]) for a, b in pairwise(sorted(holders)) if a.direction == b.direction]
    return tuple(sorted({edge for low, high in steps if low != high for edge in ((low, high), (high, low))}))


def rounds_of_meetings(edges: Iterable[Edge]) -> tuple[tuple[Edge, ...], ...]:
    """Arrange edges in rounds, in each of which a rank is at one edge at most.

    Ranks that go through the rounds in order, and in each wait for the one they meet, all come to the end: who is in
    the earliest round that is not over has its partner there, or coming from a round that is over. So edges are made,
    and used for the first time, in this order.

    Returns:
        The rounds, the same for every rank that gives the same edges.
    """
    rounds: list[list[Edge]] = []
    for edge in sorted(edges):
        free = next((own for own in rounds if not {*edge} & {rank for other in own for rank in other}), None)
        if free is None:
            rounds.append(free := [])
        free.append(edge)
    return tuple(map(tuple, rounds))
