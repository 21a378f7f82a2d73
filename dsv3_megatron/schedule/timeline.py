"""Start and end of each action, if every rank keeps to its order and starts each action as soon as its inputs are
there.

Times are whatever number the caller uses: int and Fraction give exact results, float the usual ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction

from dsv3_megatron.schedule.actions import Action
from dsv3_megatron.schedule.plan import Output, Plan

Time = int | float | Fraction


class PlanError(ValueError):
    """A plan that would not run, or would not do the work of a step."""


@dataclass(frozen=True, slots=True)
class Span:
    """An action and when it ran, planned or measured."""

    action: Action
    start: Time
    end: Time


Timeline = tuple[tuple[Span, ...], ...]  # by rank, in order


def run_in_order(plan: Plan, duration: Callable[[int, Action], Time], delay: Time = 0,
                 tail: Callable[[int, Action], Time] = lambda _rank, _action: 0, *,
                 delay_of_boundary: Mapping[int, Time] | None = None) -> Timeline:
    """Run a plan without a clock of its own: each rank goes on until it lacks something, and again when that is made.

    Args:
        plan: Any plan; it need not be sound.
        duration: Rank and action -> how long it takes.
        delay: Time that passes between the hand-over of an output and its use on another rank. It keeps no rank from
            computing.
        tail: Rank and action -> how long the action goes on after it has handed over its outputs.
        delay_of_boundary: The delay at single boundaries between stages, by `Output.boundary`, where it is another.

    Raises:
        PlanError: some ranks wait for what is never made: the order has a cycle, or lacks an operation.
    """
    made: dict[Output, tuple[Time, int]] = {}
    waiting: dict[Output, list[int]] = {}
    spans: list[list[Span]] = [[] for _ in range(plan.num_ranks)]
    clocks: list[Time] = [0] * plan.num_ranks
    runnable = list(range(plan.num_ranks))
    while runnable:
        rank = runnable.pop()
        while len(spans[rank]) < len(plan.actions[rank]):
            action = plan.actions[rank][len(spans[rank])]
            start = clocks[rank]
            missing = None
            for needed in (needed for operation in action.operations for needed in plan.inputs(rank, operation)):
                if needed not in made:
                    missing = needed
                    break
                end, maker = made[needed]
                if maker != rank:
                    end += delay_of_boundary.get(needed.boundary, delay) if delay_of_boundary else delay
                start = max(start, end)
            if missing is not None:
                waiting.setdefault(missing, []).append(rank)
                break
            clocks[rank] = start + duration(rank, action)
            spans[rank].append(Span(action, start, clocks[rank]))
            for operation in action.operations:
                output = plan.output(rank, operation)
                if output is not None:
                    made[output] = (clocks[rank] - tail(rank, action), rank)
                    runnable.extend(waiting.pop(output, ()))
    if waiting:
        lacking = sorted((rank, output) for output, ranks in waiting.items() for rank in ranks)
        stuck = "; ".join(f"rank {rank} waits for the {output} before {plan.actions[rank][len(spans[rank])]}"
                          for rank, output in lacking)
        raise PlanError(f"the plan comes to a stop: {stuck}")
    return tuple(map(tuple, spans))
