"""Stages whose compute and all-to-all take known times: what schedules are measured on, without a model.

Compute sleeps, so that many ranks fit on few cores. An all-to-all is a timer in the background, one after the other on
a rank as on its network card. A pass takes the steps of a transformer layer with experts: attention, dispatch, experts,
combine; backwards likewise. A pass alone hides none of its all-to-alls; a full backward leaves attention's weight
gradients until the gradient has been handed on.

A machine with other work to do wakes a sleeper late. That is no time of the stage: the rank's next sleeps are shorter
by it. What the executor and the transport take is not taken off.

Or nothing sleeps, and each rank adds up the times (`CountedRank`). Messages between ranks carry the moment that they
were sent at. The step's time is then exact on any machine: it is what the order of the executor's actions, messages and
all-to-alls makes of the known times, with nothing for the executor itself.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dsv3_megatron.parallel.chunk_runner import Steps
from dsv3_megatron.parallel.placement import place_stages
from dsv3_megatron.schedule.execute import Executor
from dsv3_megatron.schedule.plan import Plan
from dsv3_megatron.schedule.recorder import measure_step
from dsv3_megatron.schedule.simulate import Costs, StageCosts
from dsv3_megatron.schedule.timeline import Timeline
from dsv3_megatron.schedule.transfers import edges_of
from dsv3_megatron.schedule.transport import Arrival, PipelineChannels, Transport

# A message may hold a moment, to the last digit.
SHAPE, DTYPE = (4, 1, 8), torch.float64


@dataclass(frozen=True)
class ChunkTimes:
    """Seconds of one micro-batch on one chunk.

    Attributes:
        forward: Compute of the forward.
        input_part: Compute of the backward for the input.
        weight: Compute of the backward for the weights.
        transfer: All-to-all of a forward, and of a backward.
    """

    forward: float
    input_part: float
    weight: float
    transfer: float

    def scaled(self, factor: float) -> ChunkTimes:
        """Of a chunk of another size."""
        return ChunkTimes(factor * self.forward, factor * self.input_part, factor * self.weight,
                          factor * self.transfer)

    def costs(self, num_stages: int, *, is_sent_early: bool = True) -> Costs:
        """For the simulator, with perfect hiding in pairs.

        Args:
            num_stages: Of the model.
            is_sent_early: A gradient is handed on before the last weight gradients.
        """
        stage = StageCosts(forward=self.forward + self.transfer,
                           backward=self.input_part + self.weight + self.transfer, weight=self.weight,
                           weight_tail=self.weight / 2 if is_sent_early else 0.0,
                           all_to_all_forward=self.transfer,
                           all_to_all_backward=self.transfer)
        return Costs((stage,) * num_stages)


@dataclass
class Rank:
    """A rank's processor and network card."""

    late: float = 0.0
    link_free: float = 0.0

    def compute(self, seconds: float) -> None:
        """Be busy, for less if the last sleeps were too long."""
        caught_up = min(self.late, seconds)
        self.late -= caught_up
        self._sleep_until(time.perf_counter() + seconds - caught_up)

    def now(self) -> float:
        """The moment, less what the rank woke late."""
        return time.perf_counter() - self.late

    def transfer(self, seconds: float, *, ready: float | None = None) -> float:
        """Begin an all-to-all; returns when it ends.

        Args:
            seconds: Its length.
            ready: When what it sends was there; now if None.
        """
        self.link_free = max(self.link_free, self.now() if ready is None else ready) + seconds
        return self.link_free

    def wait(self, moment: float) -> None:
        """For the end of an all-to-all."""
        if time.perf_counter() < moment:
            self._sleep_until(moment)

    def _sleep_until(self, moment: float) -> None:
        while (left := moment - time.perf_counter()) > 0:
            time.sleep(left)
        self.late += time.perf_counter() - moment


@dataclass
class CountedRank(Rank):
    """A rank that adds up its times in place of waiting for them.

    Attributes:
        moment: Seconds since the step began, as this rank counts them.
    """

    moment: float = 0.0

    def compute(self, seconds: float) -> None:
        """Be busy."""
        self.moment += seconds

    def now(self) -> float:
        """The moment."""
        return self.moment

    def wait(self, moment: float) -> None:
        """For the end of an all-to-all, or for a message that was sent then."""
        self.moment = max(self.moment, moment)


class _StampedArrival:
    def __init__(self, arrival: Arrival, rank: CountedRank) -> None:
        self._arrival, self._rank = arrival, rank

    def wait(self) -> torch.Tensor:
        tensor = self._arrival.wait()
        self._rank.wait(float(tensor.flatten()[0]))
        return tensor


class StampingTransport:
    """Messages whose content is the moment they were sent at; a rank that has waited for one is not before it.

    Args:
        transport: Carries them.
        rank: Counts the time of this rank.
    """

    def __init__(self, transport: Transport, rank: CountedRank) -> None:
        self._transport, self._rank = transport, rank

    def send(self, tensor: torch.Tensor, destination: int, length: int = 1) -> None:
        """Begin to send the moment in place of the tensor."""
        self._transport.send(torch.full_like(tensor, self._rank.moment), destination, length)

    def receive(self, source: int, length: int = 1) -> Arrival:
        """Be ready for the next message from a rank."""
        return _StampedArrival(self._transport.receive(source, length), self._rank)

    def flush(self) -> None:
        """Wait until everything is sent."""
        self._transport.flush()


class TimedStage:
    """One chunk of a rank."""

    def __init__(self, times: ChunkTimes, rank: Rank, *, is_first: bool, is_last: bool) -> None:
        self.times, self.rank, self.is_first, self.is_last = times, rank, is_first, is_last
        self.left: dict[int, float] = {}  # by micro-batch, seconds of weight gradients that wait

    def forward_steps(self, microbatch: int, input_SBH: torch.Tensor | None) -> Steps:
        """Attention, dispatch, experts, combine."""
        for _ in range(2):
            self.rank.compute(self.times.forward / 2)
            end = self.rank.transfer(self.times.transfer / 2)
            yield
            self.rank.wait(end)
        return None if self.is_last else torch.zeros(SHAPE, dtype=DTYPE)

    def backward_steps(self, microbatch: int, grad_SBH: torch.Tensor | None, *, defer_weights: bool) -> Steps:
        """Combine, experts, dispatch, attention, each backwards; attention's weights are left."""
        for weight in (0.0 if defer_weights else self.times.weight / 2, 0.0):
            end = self.rank.transfer(self.times.transfer / 2)
            yield
            self.rank.wait(end)
            self.rank.compute(self.times.input_part / 2 + weight)
        self.left[microbatch] = self.times.weight / (1 if defer_weights else 2)
        return None if self.is_first else torch.zeros(SHAPE, dtype=DTYPE)

    def backward_weight(self, microbatch: int) -> None:
        """The rest."""
        self.rank.compute(self.left.pop(microbatch))


def ring_channels(pipelines: Sequence[Sequence[int]]) -> PipelineChannels:
    """The edges of pipelines of equal lengths for any schedule, made by every rank of the run at once."""
    return PipelineChannels(pipelines, edges_of(place_stages("interleaved", len(pipelines[0]), 2)),
                            device=torch.device("cpu"))


def measure_plan(plan: Plan, times: ChunkTimes, channels: PipelineChannels, *, is_counted: bool = False) -> Timeline:
    """Run a plan on timed stages; called by every rank, all of which are one pipeline.

    Args:
        plan: Work of every rank.
        times: Times of each chunk.
        channels: Edges of the pipeline.
        is_counted: Times are added up; else they are waited for, and what the executor takes comes on top.

    Returns:
        When each rank did what, in milliseconds; the same on every rank.
    """
    number = channels.rank
    rank = CountedRank() if is_counted else Rank()
    world = torch.distributed.group.WORLD
    assert world is not None
    stages = [TimedStage(times, rank, is_first=place.stage == 0, is_last=place.stage == plan.num_stages - 1)
              for place in plan.placement[number]]
    transport: Transport = channels.transport(shape=SHAPE, dtype=DTYPE, device=torch.device("cpu"))
    if isinstance(rank, CountedRank):
        transport = StampingTransport(transport, rank)
    executor = Executor(plan, number, transport)
    return measure_step(world, lambda recorder: executor.run(stages, recorder), rank.now if is_counted else None)


def step_time(timeline: Timeline) -> float:
    """From the common start to the end of the last action."""
    return max(float(spans[-1].end) for spans in timeline)


def busy_time(plan: Plan, rank: int, costs: Costs) -> float:
    """What a rank's actions take by their known times."""
    return sum(float(costs.duration(plan, rank, action)) for action in plan.actions[rank])

