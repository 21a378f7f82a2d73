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
is then done no later than here. `validate` runs the strict form.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

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


@dataclass(frozen=True, slots=True)
class Exchange:
    """Transfers that a rank posts together and waits for together, in the order that both sides use."""

    transfers: tuple[Transfer, ...]


@dataclass(slots=True)
class _Tick:
    transfers: list[Transfer] = field(default_factory=list)
    action: Action | None = None


Program = tuple[Action | Exchange, ...]


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
    steps: list[Action | Exchange] = []
    for _, tick in sorted(ticks.items()):
        if tick.transfers:
            steps.append(Exchange(tuple(sorted(tick.transfers))))
        if tick.action is not None:
            steps.append(tick.action)
    return tuple(steps)
