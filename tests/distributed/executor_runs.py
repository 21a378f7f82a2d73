"""What `test_executor.py` runs in the processes of a launch."""

from __future__ import annotations

import random
import statistics
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsv3_megatron.schedule.execute import Executor
from dsv3_megatron.schedule.plan import build_plan
from dsv3_megatron.schedule.recorder import ScheduleTrace
from dsv3_megatron.schedule.simulate import simulate
from dsv3_megatron.schedule.timeline import Timeline
from dsv3_megatron.schedule.transport import PipelineChannels
from dsv3_megatron.schedule.validate import peak_activations
from tests.unit.schedule.arithmetic_stages import Memory, MultiplyingStage, expected_weight_grad
from tests.unit.schedule.sizes import FORMS, any_number, form, has_ranks
from tools.bench.timed_stages import ChunkTimes, measure_plan, ring_channels

UNIT_S, NUM_MICROBATCHES, NUM_PARTS = 0.012, 8, 8
# Two whose order on the machine's own clock is looked at too: the slowest, and one that hides its all-to-alls.
ON_THE_CLOCK = ("1f1b", "dualpipev")


def _channels() -> PipelineChannels:
    """The edges of a pipeline of all ranks, for every schedule."""
    return ring_channels([list(range(torch.distributed.get_world_size()))])


class Grid:
    """The first processes as pipelines side by side, whose ranks of one number exchange rows as experts' ranks do.

    Args:
        num_ranks: Of a pipeline.
        num_columns: Pipelines. Every process of the world constructs it.
    """

    def __init__(self, num_ranks: int, num_columns: int) -> None:
        grid = torch.arange(num_ranks * num_columns).reshape(num_ranks, num_columns)
        rank = torch.distributed.get_rank()
        self.experts: Any = None
        self.channels = ring_channels(grid.T.tolist())
        self.rank = rank // num_columns
        for row in grid.tolist():
            group = torch.distributed.new_group(row)
            if rank in row:
                self.experts = group

    def meet(self, name: str) -> Callable[[], None]:
        """Begin an all-to-all of a turn's name; the other pipelines' ranks must be at the same turn."""
        own = torch.full((self.experts.size(),), zlib.crc32(name.encode()))
        found = torch.empty_like(own)
        work = torch.distributed.all_to_all_single(found, own, group=self.experts, async_op=True)

        def finish() -> None:
            work.wait()
            assert torch.equal(found, own), f"another rank is not at {name}"

        return finish


def run_compositions(number: int) -> tuple[int, int]:
    """Random plans over gloo, with whole-number results.

    Returns:
        The number of them that this rank took part in, and of those with all-to-alls between pipelines.
    """
    rng = random.Random(1)
    world = torch.distributed.get_world_size()
    grids = {(ranks, columns): Grid(ranks, columns) for ranks in range(1, world + 1)
             for columns in range(1, world // ranks + 1)}
    count = with_experts = 0
    for _ in range(number):
        name = rng.choice(FORMS)
        num_ranks, num_columns = rng.choice([(ranks, columns) for ranks, columns in grids if has_ranks(name, ranks)])
        plan = form(name, num_ranks, any_number(name, num_ranks, rng), rng.randint(2, 3))
        turns = [rng.randint(0, 3) for _ in range(plan.num_stages)]
        grid = grids[num_ranks, num_columns]
        if grid.experts is None:
            continue
        memory = Memory()
        stages = [MultiplyingStage(plan, grid.rank, chunk, memory=memory, num_steps=turns[place.stage], meet=grid.meet)
                  for chunk, place in enumerate(plan.placement[grid.rank])]
        transport = grid.channels.transport(shape=(1,), dtype=torch.float64, device=torch.device("cpu"))
        Executor(plan, grid.rank, transport).run(stages)
        assert [stage.weight_grad for stage in stages] == [expected_weight_grad(plan, place)
                                                           for place in plan.placement[grid.rank]], name
        # Less where the backward of a pair has no turns: it is over before the forward begins.
        assert memory.peak <= peak_activations(plan)[grid.rank] and memory.alive == 0
        count += 1
        with_experts += num_columns > 1 and any(turns)
    return count, with_experts


@dataclass(frozen=True)
class MeasuredStep:
    """A step on stages of known times.

    Attributes:
        simulated: Its milliseconds, as simulated.
        counted: When each rank did what, where times are added up as the executor's order has it.
        on_the_clock: The same where they are waited for; None for schedules of which this is not measured.
    """

    simulated: float
    counted: Timeline
    on_the_clock: Timeline | None


def measure_schedules() -> dict[str, MeasuredStep]:
    """A step of each schedule."""
    channels, num_ranks = _channels(), torch.distributed.get_world_size()
    found = {}
    for name in FORMS:
        plan = form(name, num_ranks, NUM_MICROBATCHES)
        times = ChunkTimes(UNIT_S, UNIT_S, UNIT_S, UNIT_S).scaled(NUM_PARTS / plan.num_stages)
        found[name] = MeasuredStep(
            1000.0 * float(simulate(plan, times.costs(plan.num_stages)).step_time),
            measure_plan(plan, times, channels, is_counted=True),
            measure_plan(plan, times, channels) if name in ON_THE_CLOCK else None)
    return found


def pair_time(timeline: Timeline) -> float:
    """Milliseconds of the median overlapped pair."""
    return statistics.median(float(span.end - span.start) for spans in timeline for span in spans
                             if span.action.is_overlapped)


def record_trace(path: Path) -> None:
    """Three steps with a trace wanted; the file then has the second."""
    channels, world = _channels(), torch.distributed.group.WORLD
    assert world is not None
    plan = build_plan("dualpipev", num_ranks=world.size(), num_microbatches=8)
    rank = channels.rank
    trace = ScheduleTrace(str(path))
    transport = channels.transport(shape=(1,), dtype=torch.float64, device=torch.device("cpu"))
    executor = Executor(plan, rank, transport)
    for number in range(3):
        stages = [MultiplyingStage(plan, rank, chunk) for chunk in range(plan.num_chunks)]
        assert trace.is_wanted == (number < 2)
        if trace.is_wanted:
            trace.record(plan, world, lambda recorder, stages=stages: executor.run(stages, recorder))
        else:
            executor.run(stages)


def run_all(trace: Path, compositions: int) -> dict[str, Any]:
    """All of it, in one launch."""
    counts = run_compositions(compositions)
    record_trace(trace)
    return {"compositions": counts, "measured": measure_schedules()}
