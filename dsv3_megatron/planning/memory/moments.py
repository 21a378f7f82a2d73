"""What each rank of a pipeline holds of how many micro-batches, at every action of its schedule.

Read from the same plan and transfers that the executor runs, so it knows of a schedule no more than that does. The
moments of a step repeat: of thousands of actions a few dozen kinds are left, and they are remembered.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

from dsv3_megatron.planning.memory.ledger import Turn, run_turns
from dsv3_megatron.planning.memory.stage_cost import StageCost
from dsv3_megatron.schedule.actions import Action, Kind
from dsv3_megatron.schedule.plan import Output, Plan, PlanSizes, known_plan
from dsv3_megatron.schedule.transfers import MAX_UNFINISHED_SENDS, RECEIVE_AHEAD, TransferBatch, with_transfers

# Sent tensors to a rank that may still be held: gloo's until they are waited for; NCCL says when a send is done.
MAX_UNFINISHED = {"cpu": MAX_UNFINISHED_SENDS, "cuda": 1}
# A step of more micro-batches than this many times the ranks holds no more at once than one of as many.
_STEADY_ROUNDS = 4


class Moment(NamedTuple):
    """A rank's state at the beginning of an action.

    Attributes:
        kept: Micro-batches between forward and backward, by chunk.
        deferred: Micro-batches whose weight gradients wait, by chunk.
        on_the_way: Hidden states between stages, or their gradients: arriving, waiting for their use, being sent. A
            tensor from a stage with MTP modules to one with the losses counts once for each depth.
        operations: What the action does: kind and chunk.
    """

    kept: tuple[int, ...]
    deferred: tuple[int, ...]
    on_the_way: int
    operations: tuple[tuple[Kind, int], ...]


class Peak(NamedTuple):
    """The moment at which a rank holds most, in bytes.

    Attributes:
        moment: The moment of the step.
        kept: Bytes that forward passes have kept.
        deferred: Bytes that weight gradients wait with.
        on_the_way: Bytes of tensors between stages.
        working: Bytes of the pass itself, beyond what was there when it began.
    """

    moment: Moment
    kept: int
    deferred: int
    on_the_way: int
    working: int

    @property
    def total(self) -> int:
        """Bytes of all four parts together."""
        return self.kept + self.deferred + self.on_the_way + self.working


def steady_microbatches(num_ranks: int, num_microbatches: int) -> int:
    """A number of micro-batches whose step holds no less at once than one of as many as asked for: few, or all."""
    return min(num_microbatches, _STEADY_ROUNDS * num_ranks)


@functools.lru_cache(maxsize=8192)
def rank_moments(sizes: PlanSizes, rank: int, max_unfinished: int, last_length: int = 1) -> tuple[Moment, ...]:
    """The different moments of a rank in a step, none that another one has more of everything than.

    Args:
        sizes: Sizes of the schedule, on at least 2 ranks; see `steady_microbatches`.
        rank: Pipeline rank whose moments are wanted.
        max_unfinished: Sent tensors to a rank that may still be held.
        last_length: Hidden states in a tensor between the last two stages.
    """
    program = _programs(sizes)[rank]
    moments = _moments(known_plan(sizes), program, rank, max_unfinished, last_length)
    return tuple(dict.fromkeys(_without_smaller(moments)))


@functools.lru_cache(maxsize=512)
def _programs(sizes: PlanSizes) -> tuple:
    return with_transfers(known_plan(sizes))


def _without_smaller(moments: Iterator[Moment]) -> list[Moment]:
    """Keep for each kind of action the moments that no other one covers."""
    by_kind: dict[tuple, list[Moment]] = {}
    for moment in dict.fromkeys(moments):
        rivals = by_kind.setdefault(moment.operations, [])
        if any(_covers(rival, moment) for rival in rivals):
            continue
        rivals[:] = [rival for rival in rivals if not _covers(moment, rival)] + [moment]
    return [moment for rivals in by_kind.values() for moment in rivals]


def _covers(more: Moment, less: Moment) -> bool:
    return more.on_the_way >= less.on_the_way and all(
        a >= b for a, b in zip((*more.kept, *more.deferred), (*less.kept, *less.deferred), strict=True))


def _moments(plan: Plan, program: tuple, rank: int, max_unfinished: int, last_length: int) -> Iterator[Moment]:
    """Moments at every action, as `schedule/execute.py` runs them."""
    def length(output: Output) -> int:
        return last_length if output.boundary == plan.num_stages - 2 else 1

    kept, deferred = [0] * plan.num_chunks, [0] * plan.num_chunks
    receives: deque[tuple[int, int]] = deque()  # numbers of the actions before the receives' places, and lengths
    num_actions = 0
    for step in program:
        if isinstance(step, TransferBatch):
            receives += [(num_actions, length(transfer.output)) for transfer in step.transfers
                         if transfer.destination == rank]
        else:
            num_actions += 1
    arriving = made = num_actions = 0
    unfinished: dict[int, deque[int]] = {}
    for step in program:
        if isinstance(step, TransferBatch):
            for transfer in step.transfers:
                if transfer.source == rank:
                    made -= length(transfer.output)
                    unfinished.setdefault(transfer.destination, deque(maxlen=max_unfinished)).append(
                        length(transfer.output))
            continue
        while receives and receives[0][0] <= num_actions + RECEIVE_AHEAD:
            arriving += receives.popleft()[1]
        yield Moment(tuple(kept), tuple(deferred), arriving + made + sum(map(sum, unfinished.values())),
                     tuple((operation.kind, operation.chunk) for operation in step.operations))
        arrived, own = _used(plan, rank, step, length)
        arriving, made = arriving - arrived, made - own
        for operation in step.operations:
            output = plan.output(rank, operation)
            made += length(output) if output is not None and plan.receiver(output) is not None else 0
            if operation.kind is Kind.FORWARD:
                kept[operation.chunk] += 1
            elif operation.kind is Kind.BACKWARD_WEIGHT:
                deferred[operation.chunk] -= 1
            else:
                kept[operation.chunk] -= 1
                deferred[operation.chunk] += operation.kind is Kind.BACKWARD_INPUT
        num_actions += 1


def _used(plan: Plan, rank: int, action: Action, length: Callable[[Output], int]) -> tuple[int, int]:
    """Hidden states that an action takes: from other ranks, and from this one."""
    arrived = own = 0
    for operation in action.operations:
        operand = plan.operand(rank, operation)
        if operand is None:
            continue
        direction, _ = plan.placement[rank][operation.chunk]
        is_own = any(place == (direction, operand.stage) for place in plan.placement[rank])
        own += is_own * length(operand)
        arrived += (not is_own) * length(operand)
    return arrived, own


def peak_of(moments: tuple[Moment, ...], costs: tuple[StageCost, ...]) -> Peak:
    """The moment at which a rank holds most.

    Args:
        moments: Moments of the rank, as `rank_moments` gives them.
        costs: Costs of the rank's chunks.
    """
    kept = [cost.kept_bytes for cost in costs]
    deferred = [cost.deferred_bytes for cost in costs]
    boundary = costs[0].boundary
    working: dict[tuple, int] = {}
    best: Peak | None = None
    for moment in moments:
        if moment.operations not in working:
            working[moment.operations] = run_turns(_turns(moment.operations, costs)).peak
        peak = Peak(moment, sum(map(int.__mul__, moment.kept, kept)), sum(map(int.__mul__, moment.deferred, deferred)),
                    moment.on_the_way * boundary, working[moment.operations])
        if best is None or peak.total > best.total:
            best = peak
    assert best is not None, "a step has actions"
    return best


def _turns(operations: tuple[tuple[Kind, int], ...], costs: tuple[StageCost, ...]) -> list[Turn]:
    """Turns of one operation, or of a pair in alternation, the backward first (see `execute.take_turns`)."""
    queues = [deque(_turns_of(kind, costs[chunk])) for kind, chunk in reversed(operations)]
    order = []
    while any(queues):
        order += [queue.popleft() for queue in queues if queue]
    return order + [costs[chunk].completion for kind, chunk in operations if kind is Kind.BACKWARD]


def _turns_of(kind: Kind, cost: StageCost) -> tuple[Turn, ...]:
    if kind is Kind.FORWARD:
        return cost.forward
    if kind is Kind.BACKWARD:
        return cost.backward
    return cost.backward_input if kind is Kind.BACKWARD_INPUT else (cost.weight,)
