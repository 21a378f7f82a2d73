"""A pipeline schedule as data: who holds which stage, and what every rank runs in which order.

Usage:
    plan = build_plan("dualpipev", num_ranks=4, num_microbatches=16)
    plan.actions[0][0]             # rank 0's first action
    plan.placement[0][1].stage     # the stage that is rank 0's chunk 1

P ranks hold these stages of the model (the same number of stages means the same stage size):

    schedule      stages  rank r's chunks, as stages        directions
    1f1b, zb1p    P       r                                 1
    interleaved   V * P   r, P+r, 2P+r, ... (V of them)     1
    zbv           2P      r, 2P-1-r                         1
    dualpipev     2P      r, 2P-1-r                         1
    dualpipe      P       min(r, P-1-r), max(r, P-1-r)      2

DualPipe has two copies of the model, laid along the ranks in opposite directions: half of the micro-batches enter at
rank 0 and half at rank P-1. Chunk 0 of a rank is the direction that enters at its nearer end, so it is direction 0 on
the first half of the ranks and direction 1 on the second, and ranks r and P-1-r run the same order. The micro-batches
of each direction are numbered from 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.parallel import ParallelConfig
from dsv3_megatron.config.pipeline import (
    SCHEDULES,
    microbatches_problem,
    nearest_microbatches,
    num_model_copies,
    ranks_problem,
    require_schedule,
    stages_per_rank,
    stages_problem,
)
from dsv3_megatron.parallel.placement import PlacedStage, Placement, place_stages
from dsv3_megatron.schedule import orders
from dsv3_megatron.schedule.actions import Action, Kind, Operation

__all__ = ["SCHEDULES", "Output", "PlacedStage", "Plan", "build_plan", "forward_plan"]


class Output(NamedTuple):
    """What an operation makes and another one waits for: a stage's output, or the gradient of a stage's input."""

    is_gradient: bool
    direction: int
    stage: int
    microbatch: int

    @property
    def boundary(self) -> int:
        """Number of the boundary between two stages that the tensor crosses: that of the stage before it."""
        return self.stage - 1 if self.is_gradient else self.stage

    def __str__(self) -> str:
        direction = f" of direction {self.direction}" if self.direction else ""
        return (f"{'gradient' if self.is_gradient else 'output'} of stage {self.stage}{direction}, "
                f"micro-batch {self.microbatch}")


@dataclass(frozen=True)
class Plan:
    """The work of every rank in one step of a pipeline.

    Attributes:
        schedule: Name of a schedule, one of SCHEDULES.
        num_microbatches: Micro-batches of the whole step, both directions together.
        placement: The stage that each chunk is, by rank and by chunk.
        actions: What each rank runs, in order, by rank.
        is_overlapped: Interleaved 1F1B with forward & backward pairs; DualPipe has them always.
    """

    schedule: str
    num_microbatches: int
    placement: Placement
    actions: tuple[tuple[Action, ...], ...]
    is_overlapped: bool = False

    @property
    def num_ranks(self) -> int:
        """Number of pipeline ranks, P."""
        return len(self.placement)

    @property
    def num_chunks(self) -> int:
        """Stages that a rank holds."""
        return len(self.placement[0])

    @cached_property
    def holders(self) -> dict[PlacedStage, int]:
        """The rank that holds each stage."""
        return {place: rank for rank, places in enumerate(self.placement) for place in places}

    @cached_property
    def num_stages(self) -> int:
        """Number of stages of the model."""
        return 1 + max(place.stage for place in self.holders)

    @cached_property
    def num_directions(self) -> int:
        """Copies of the model."""
        return 1 + max(place.direction for place in self.holders)

    @property
    def microbatches_per_chunk(self) -> int:
        """Micro-batches that go through each stage of a copy."""
        return self.num_microbatches // self.num_directions

    def inputs(self, rank: int, operation: Operation) -> Iterator[Output]:
        """What must have been made, here or on another rank, before an operation can run."""
        if operation.kind is not Kind.FORWARD:
            is_split = operation.kind is Kind.BACKWARD_WEIGHT
            yield Output(is_split, *self.placement[rank][operation.chunk], operation.microbatch)
        operand = self.operand(rank, operation)
        if operand is not None:
            yield operand

    def operand(self, rank: int, operation: Operation) -> Output | None:
        """What is handed to an operation: the stage before's output or the stage after's gradient; None at the ends."""
        direction, stage = self.placement[rank][operation.chunk]
        if operation.kind is Kind.FORWARD:
            return Output(False, direction, stage - 1, operation.microbatch) if stage > 0 else None
        if operation.kind is Kind.BACKWARD_WEIGHT or stage == self.num_stages - 1:
            return None
        return Output(True, direction, stage + 1, operation.microbatch)

    def output(self, rank: int, operation: Operation) -> Output | None:
        """What an operation makes; nothing that anyone waits for if it is a weight part."""
        if operation.kind is Kind.BACKWARD_WEIGHT:
            return None
        return Output(operation.kind is not Kind.FORWARD, *self.placement[rank][operation.chunk], operation.microbatch)

    def receiver(self, output: Output) -> int | None:
        """The rank that waits for an output; none at the ends of the pipeline."""
        stage = output.stage + (-1 if output.is_gradient else 1)
        return self.holders.get(PlacedStage(output.direction, stage))


def build_plan(schedule: str, *, num_ranks: int, num_microbatches: int, virtual_stages: int | None = None,
               is_overlapped: bool = False) -> Plan:
    """Write down what every rank of a pipeline does in one step.

    Args:
        schedule: Name of a schedule, one of SCHEDULES.
        num_ranks: P, pipeline_model_parallel_size.
        num_microbatches: Micro-batches of the step, on each data-parallel rank.
        virtual_stages: Chunks per rank of the interleaved schedule, 2 if not given; the others have their own number.
        is_overlapped: Interleaved only: run forwards and backwards of the steady state as pairs.

    Raises:
        ConfigError: there is no such schedule, or it cannot be had with these sizes.
    """
    num_chunks = _check(schedule, num_ranks, num_microbatches, virtual_stages, is_overlapped)
    placement = place_stages(schedule, num_ranks, stages_per_rank(schedule, virtual_stages))
    actions = []
    for rank in range(num_ranks):
        if schedule == "dualpipe":
            # Ranks r and P-1-r run the same order, each on the direction that is nearer to it.
            actions.append(orders.dualpipe(placement[rank][0].stage, num_ranks // 2, num_microbatches // 2))
        elif schedule == "interleaved":
            actions.append(orders.interleaved(rank, num_ranks, num_microbatches, num_chunks, is_overlapped))
        else:
            actions.append(_ORDERS[schedule](rank, num_ranks, num_microbatches))
    return Plan(schedule, num_microbatches, placement, tuple(actions), is_overlapped)


class PlanSizes(NamedTuple):
    """The arguments of `build_plan`."""

    schedule: str
    num_ranks: int
    num_microbatches: int
    virtual_stages: int | None = None
    is_overlapped: bool = False

    @classmethod
    def of_run(cls, parallel: ParallelConfig, num_microbatches: int) -> PlanSizes:
        """The sizes of a training step of a run, with so many micro-batches on each data-parallel rank."""
        is_interleaved = parallel.schedule == "interleaved"
        return cls(parallel.schedule, parallel.pipeline_model_parallel_size, num_microbatches,
                   parallel.stages_per_rank if is_interleaved else None, is_interleaved and parallel.has_pairs)


@lru_cache(maxsize=512)
def known_plan(sizes: PlanSizes) -> Plan:
    """`build_plan`, remembered: plans of many micro-batches take a while to make."""
    return build_plan(**sizes._asdict())


def forward_plan(schedule: str, *, num_ranks: int, num_microbatches: int, virtual_stages: int | None = None) -> Plan:
    """The forward passes alone, on the stages of a schedule: what a validation runs.

    Micro-batch m is on stage s at tick m + s, or waits; that order has no cycle whatever the placement. So there need
    not be as many micro-batches as for training.

    Args:
        schedule: One of SCHEDULES, whose placement is used.
        num_ranks: P; even for dualpipe.
        num_microbatches: Micro-batches of the step; even for dualpipe.
        virtual_stages: Chunks per rank of the interleaved schedule, as in `build_plan`.
    """
    assert num_microbatches % num_model_copies(schedule) == 0, "each copy of the model has as many micro-batches"
    placement = place_stages(schedule, num_ranks, stages_per_rank(schedule, virtual_stages))
    actions = []
    for places in placement:
        forwards = sorted((microbatch + place.stage, chunk, microbatch) for chunk, place in enumerate(places)
                          for microbatch in range(num_microbatches // num_model_copies(schedule)))
        actions.append(tuple(Action((Operation(Kind.FORWARD, chunk, microbatch),))
                             for _, chunk, microbatch in forwards))
    return Plan(schedule, num_microbatches, placement, tuple(actions))


_ORDERS = {
    "1f1b": orders.one_forward_one_backward, "zb1p": orders.zero_bubble, "zbv": orders.zero_bubble_v,
    "dualpipev": orders.dualpipe,
}


def _check(schedule: str, num_ranks: int, num_microbatches: int, virtual_stages: int | None, is_overlapped: bool,
           ) -> int:
    """The rules; returns the number of chunks per rank."""
    require_schedule(schedule, "schedule")
    for name, value in (("pipeline_model_parallel_size", num_ranks), ("num_microbatches", num_microbatches)):
        if value < 1:
            raise ConfigError(f"{name}={value} must be at least 1")
    if is_overlapped and schedule != "interleaved":
        raise ConfigError(f"is_overlapped is an option of the interleaved schedule, not of schedule={schedule}; "
                          "leave it out")
    own = stages_per_rank(schedule) * num_model_copies(schedule)
    num_chunks = own if virtual_stages is None else virtual_stages
    problem = stages_problem(schedule, num_chunks, "schedule", name="virtual_stages", unset=own)
    if problem:
        raise ConfigError(f"{problem}; " + ("try 2, or use schedule=1f1b" if schedule == "interleaved" else
                                            "leave it out, or use schedule=interleaved"))
    problem = ranks_problem(schedule, num_ranks, "schedule")
    if problem:
        below = [number for number in (num_ranks - 1, num_ranks + 1)
                 if number and not ranks_problem(schedule, number, "schedule")]
        raise ConfigError(f"{problem}; try {' or '.join(map(str, below))}, or schedule="
                          f"{'1f1b' if schedule == 'interleaved' else 'dualpipev'}")
    problem = microbatches_problem(schedule, num_ranks, num_microbatches, "schedule")
    if problem:
        ways = " or ".join(map(str, nearest_microbatches(schedule, num_ranks, num_microbatches)))
        raise ConfigError(f"{problem}; try num_microbatches={ways}")
    return num_chunks
