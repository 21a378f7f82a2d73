"""Runs a plan on real stages, whatever its schedule.

Usage:
    executor = Executor(plan, rank, transport)
    executor.run(runners)              # one step; runners[c] is this rank's chunk c

A rank runs its actions in the plan's order. Around them go the transfers that `with_transfers` put there, in the order
of `issue_order`. A receive is posted before its place, while the actions before it run; it is waited for only by the
action that uses it. A send is posted at its place, right behind the action that made the tensor, and not waited for; of
a full backward even before its last weight gradients, which no rank waits for. So every transfer is posted no later,
and waited for no earlier, than in the strict order that `validate` proves free of deadlock; and the messages between
two ranks keep that order, on both sides. That this order runs to its end where messages wait for one another, as on a
GPU's communicators, `delivery` proves.

What one stage hands to another on the same rank (DualPipeV and ZB-V at the fold) is handed over as it is.

The executor holds a tensor from its arrival to its use, and an output from its making to its sending. What a
micro-batch needs for its backward is the runners'.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch

from dsv3_megatron.parallel.chunk_runner import ChunkRunner, Steps
from dsv3_megatron.schedule.actions import Action, Kind, Operation
from dsv3_megatron.schedule.plan import Output, PlacedStage, Plan
from dsv3_megatron.schedule.transfers import Receive, Send, Transfer, issue_order, with_transfers
from dsv3_megatron.schedule.transport import Arrival, Transport


class Recorder(Protocol):
    """Notes when actions begin and end."""

    def begin(self, action: Action) -> None:
        """Note that the action's inputs are there."""
        ...

    def end(self, action: Action) -> None:
        """Note that the action is complete; its outputs are on their way already."""
        ...


class Executor:
    """One rank's part of a plan, to be run step after step.

    Args:
        plan: A sound plan.
        rank: Pipeline rank whose part is run.
        transport: Messages to and from the other ranks.
        lengths: How many times as long as others the tensors are that cross a boundary between stages, by
            `Output.boundary`; 1 where nothing is said.
    """

    def __init__(self, plan: Plan, rank: int, transport: Transport, lengths: Mapping[int, int] | None = None) -> None:
        self.plan, self.rank, self.transport, self.lengths = plan, rank, transport, lengths or {}
        self._issued = issue_order(with_transfers(plan)[rank], rank)

    def run(self, runners: Sequence[ChunkRunner], recorder: Recorder | None = None) -> None:
        """Run one step; called by every rank of the pipeline.

        Args:
            runners: This rank's chunks.
            recorder: Recorder that is told of each action; None: nobody is.

        Raises:
            Exception: what a runner or the transport raised, with a note of the action.
        """
        assert len(runners) == self.plan.num_chunks, "a runner for each chunk"
        step = _Step(self.plan, self.rank, self.transport, self.lengths, runners)
        for item in self._issued:
            if isinstance(item, Send):
                step.send(item.transfer)
                continue
            step.complete(recorder)
            if isinstance(item, Receive):
                step.receive(item.transfer)
            else:
                step.run(item, recorder)
        step.complete(recorder)
        step.finish()


class _Step:
    """What a rank holds between the actions of one step."""

    def __init__(self, plan: Plan, rank: int, transport: Transport, lengths: Mapping[int, int],
                 runners: Sequence[ChunkRunner]) -> None:
        self.plan, self.rank, self.transport, self.lengths, self.runners = plan, rank, transport, lengths, runners
        self.arrivals: dict[Output, Arrival] = {}
        self.made: dict[Output, torch.Tensor] = {}
        self.current: Action | None = None   # the action that is not complete
        self.num_begun = 0

    def receive(self, transfer: Transfer) -> None:
        self.arrivals[transfer.output] = self.transport.receive(transfer.source, self._length(transfer.output))

    def send(self, transfer: Transfer) -> None:
        self.transport.send(self.made.pop(transfer.output), transfer.destination, self._length(transfer.output))

    def _length(self, output: Output) -> int:
        return self.lengths.get(output.boundary, 1)

    def run(self, action: Action, recorder: Recorder | None) -> None:
        """An action up to where its outputs are made."""
        self.current = action
        self.num_begun += 1
        with self._noting_errors():
            operands = [self._take(operation) for operation in action.operations]
            if recorder is not None:
                recorder.begin(action)
            turns: list[Steps] = []
            # Of a pair the backward goes first, see `parallel/chunk_runner.py`.
            for operation in reversed(action.operations):
                runner = self.runners[operation.chunk]
                if operation.kind is Kind.BACKWARD_WEIGHT:
                    runner.backward_weight(operation.microbatch)
                elif operation.kind is Kind.FORWARD:
                    turns.append(runner.forward_steps(operation.microbatch, operands.pop()))
                else:
                    turns.append(runner.backward_steps(operation.microbatch, operands.pop(),
                                                       defer_weights=operation.kind is Kind.BACKWARD_INPUT))
            for operation, result in zip(reversed(action.operations), take_turns(turns), strict=False):
                self._keep(operation, result)

    def complete(self, recorder: Recorder | None) -> None:
        """The rest of the current action, if there is one: what a full backward left of its weight gradients."""
        if self.current is None:
            return
        with self._noting_errors():
            for operation in self.current.operations:
                if operation.kind is Kind.BACKWARD:
                    self.runners[operation.chunk].backward_weight(operation.microbatch)
        if recorder is not None:
            recorder.end(self.current)
        self.current = None

    @contextmanager
    def _noting_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            assert self.current is not None
            error.add_note(f"pipeline rank {self.rank} was at {self.current}, action {self.num_begun} of "
                           f"{len(self.plan.actions[self.rank])}: {self.describe(self.current)}")
            raise

    def _take(self, operation: Operation) -> torch.Tensor | None:
        """The tensor that an operation works on, from another rank or from this one."""
        operand = self.plan.operand(self.rank, operation)
        if operand is None:
            return None
        if operand in self.made:
            return self.made.pop(operand)
        return self.arrivals.pop(operand).wait()

    def _keep(self, operation: Operation, result: torch.Tensor | None) -> None:
        output = self.plan.output(self.rank, operation)
        assert output is not None
        if self.plan.receiver(output) is None:
            return
        if result is None:
            raise ValueError(f"the runner of chunk {operation.chunk} returned nothing for the {output}, which another "
                             "stage waits for")
        self.made[output] = result

    def describe(self, action: Action) -> str:
        """Say for a reader what the action is, and where its inputs come from."""
        parts = []
        for operation in action.operations:
            direction, stage = self.plan.placement[self.rank][operation.chunk]
            operand = self.plan.operand(self.rank, operation)
            source = None if operand is None else self.plan.holders[PlacedStage(direction, operand.stage)]
            parts.append(f"{operation.kind.name.lower().replace('_', ' ')} of micro-batch {operation.microbatch} on "
                         f"stage {stage}" + (f" of direction {direction}" if self.plan.num_directions > 1 else "")
                         + (f" with the {operand} from rank {source}" if operand is not None else ""))
        return f"{self.plan.schedule}, " + " and ".join(parts)

    def finish(self) -> None:
        assert not self.arrivals and not self.made, "every tensor of a plan is used"
        self.transport.flush()


def take_turns(generators: Sequence[Steps]) -> list[torch.Tensor | None]:
    """Run generators in strict alternation, one resume each; the rest of the longest at the end.

    Returns:
        What each returned, in their order.
    """
    results: list[torch.Tensor | None] = [None] * len(generators)
    running = deque(enumerate(generators))
    while running:
        index, generator = running.popleft()
        try:
            next(generator)
        except StopIteration as stop:
            results[index] = stop.value
        else:
            running.append((index, generator))
    return results
