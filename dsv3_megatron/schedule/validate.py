"""Proof that a plan does the work of a step, runs to its end and holds no more activations than promised.

It runs to its end on two transports: one without buffers, here, where a rank waits for all that it exchanges; and one
with the rules of a GPU's communicators, in `delivery`. It knows nothing of how a plan was made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from dsv3_megatron.schedule.actions import Action, Kind
from dsv3_megatron.schedule.delivery import check_delivery
from dsv3_megatron.schedule.formulas import activation_bound
from dsv3_megatron.schedule.plan import Output, Plan
from dsv3_megatron.schedule.timeline import PlanError
from dsv3_megatron.schedule.transfers import Program, Transfer, TransferBatch, with_transfers


def validate_plan(plan: Plan) -> None:
    """Check everything below, in this order.

    Raises:
        PlanError: the first thing that is wrong, with the rank and the action.
    """
    check_work(plan)
    programs = with_transfers(plan)
    check_rendezvous(plan, programs)
    check_delivery(plan, programs)
    for rank, (peak, bound) in enumerate(zip(peak_activations(plan), activation_bound(plan), strict=True)):
        if peak > bound:
            raise PlanError(f"rank {rank} holds the activations of {peak} chunks at once; {plan.schedule} with "
                            f"{plan.num_ranks} ranks promises {bound}")


def check_work(plan: Plan) -> None:
    """Every stage is held once; every micro-batch goes forward, then backward, through every chunk, exactly once.

    Raises:
        PlanError: an operation is missing, there twice, or on a rank before the one it follows; or a pair is no pair.
    """
    places = Counter(place for rank in plan.placement for place in rank)
    expected = {(direction, stage) for direction in range(plan.num_directions) for stage in range(plan.num_stages)}
    if set(places) != expected or max(places.values()) > 1:
        raise PlanError(f"{plan.num_stages} stages in {plan.num_directions} directions must each be held by one rank; "
                        f"the placement is {plan.placement}")
    for rank, actions in enumerate(plan.actions):
        _check_rank(plan, rank, actions)


# What must have been done before an operation, and what may have been done in the end.
_BEFORE = {Kind.BACKWARD: Kind.FORWARD, Kind.BACKWARD_INPUT: Kind.FORWARD, Kind.BACKWARD_WEIGHT: Kind.BACKWARD_INPUT}
_COMPLETE = (["F", "B"], ["F", "I", "W"])


def _check_rank(plan: Plan, rank: int, actions: Sequence[Action]) -> None:
    microbatches = range(plan.microbatches_per_chunk)
    done: dict[tuple[int, int], list[str]] = {
        (chunk, microbatch): [] for chunk in range(plan.num_chunks) for microbatch in microbatches}
    for action in actions:
        kinds = [operation.kind for operation in action.operations]
        if len(kinds) != 1 and kinds != [Kind.FORWARD, Kind.BACKWARD]:
            raise PlanError(f"rank {rank} runs {action} at once; only a forward and a full backward overlap")
        for operation in action.operations:
            kind, chunk, microbatch = operation
            own = done.get((chunk, microbatch))
            if own is None:
                raise PlanError(f"rank {rank} runs {operation}; it has chunks 0..{plan.num_chunks - 1} and micro-"
                                f"batches 0..{plan.microbatches_per_chunk - 1} of each")
            if kind in own:
                raise PlanError(f"rank {rank} runs {operation} twice")
            if kind in _BEFORE and _BEFORE[kind] not in own:
                raise PlanError(f"rank {rank} runs {operation} before {_BEFORE[kind]}{chunk}.{microbatch}")
        for kind, chunk, microbatch in action.operations:  # after both: a pair's backward cannot be of its forward
            done[chunk, microbatch].append(kind)
    for (chunk, microbatch), own_kinds in done.items():
        if own_kinds not in _COMPLETE:
            raise PlanError(f"rank {rank} runs {', '.join(own_kinds) or 'nothing'} of chunk {chunk}, micro-batch "
                            f"{microbatch}; it must be F and B, or F, I and W")


def peak_activations(plan: Plan) -> tuple[int, ...]:
    """Most chunks whose activations a rank holds at once, by rank.

    They are there from the beginning of a forward to the end of the backward or of its weight part.
    """
    peaks = []
    for actions in plan.actions:
        held = peak = 0
        for action in actions:
            kinds = [operation.kind for operation in action.operations]
            held += kinds.count(Kind.FORWARD)
            peak = max(peak, held)
            held -= kinds.count(Kind.BACKWARD) + kinds.count(Kind.BACKWARD_WEIGHT)
        peaks.append(peak)
    return tuple(peaks)


def check_rendezvous(plan: Plan, programs: Sequence[Program]) -> None:
    """Run programs on a transport without buffers: a rank leaves an exchange when every transfer in it is done.

    A transfer is done when both its ends are in the exchange that holds it. Between two ranks, transfers in one
    direction carry no names: the n-th sent is the n-th received.

    Raises:
        PlanError: ranks wait for each other; or one side has a transfer that the other lacks or has at another place;
            or something is sent before it is made, or used before it is received.
    """
    _check_same_order(programs)
    _check_reaches(plan, programs)
    positions = [0] * len(programs)
    posted: Counter[Transfer] = Counter()
    entered: set[tuple[int, int]] = set()
    waiting: dict[Transfer, int] = {}
    runnable = list(range(len(programs)))
    while runnable:
        rank = runnable.pop()
        while positions[rank] < len(programs[rank]):
            step = programs[rank][positions[rank]]
            if isinstance(step, TransferBatch):
                if (rank, positions[rank]) not in entered:
                    entered.add((rank, positions[rank]))
                    for transfer in step.transfers:
                        posted[transfer] += 1
                        if transfer in waiting:
                            runnable.append(waiting.pop(transfer))
                pending = next((transfer for transfer in step.transfers if posted[transfer] < 2), None)
                if pending is not None:
                    waiting[pending] = rank
                    break
            positions[rank] += 1
    if waiting:
        stuck = "; ".join(f"rank {rank} waits for rank "
                          f"{transfer.source + transfer.destination - rank} with the {transfer.output}"
                          for rank, transfer in sorted((rank, transfer) for transfer, rank in waiting.items()))
        raise PlanError(f"deadlock: {stuck}")


def _check_same_order(programs: Sequence[Program]) -> None:
    """What each pair of ranks sends and receives must be the same list."""
    lists: dict[tuple[int, int], tuple[list[Output], list[Output]]] = {}
    for rank, program in enumerate(programs):
        for step in program:
            for transfer in step.transfers if isinstance(step, TransferBatch) else ():
                sent, received = lists.setdefault((transfer.source, transfer.destination), ([], []))
                (sent if rank == transfer.source else received).append(transfer.output)
    for (source, destination), (sent, received) in lists.items():
        if sent != received:
            index = next((i for i, (a, b) in enumerate(zip(sent, received, strict=False)) if a != b),
                         min(len(sent), len(received)))
            raise PlanError(
                f"rank {source} sends rank {destination} {len(sent)} transfers and that expects {len(received)}; "
                f"number {index} is the {sent[index] if index < len(sent) else 'none'} to the one and the "
                f"{received[index] if index < len(received) else 'none'} to the other")


def _check_reaches(plan: Plan, programs: Sequence[Program]) -> None:
    """A rank sends what it has made, and uses what it has made or received."""
    for rank, program in enumerate(programs):
        present: set[Output] = set()
        for step in program:
            if isinstance(step, TransferBatch):
                for transfer in step.transfers:
                    if transfer.destination == rank:
                        present.add(transfer.output)
                    elif transfer.output not in present:
                        raise PlanError(f"rank {rank} sends the {transfer.output} before it has made it")
                continue
            for operation in step.operations:
                lacking = [needed for needed in plan.inputs(rank, operation) if needed not in present]
                if lacking:
                    raise PlanError(f"rank {rank} runs {operation} before it has the {lacking[0]}")
            present.update(output for operation in step.operations
                           if (output := plan.output(rank, operation)) is not None)
