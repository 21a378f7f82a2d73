"""Stages that multiply, threads as ranks, and a transport without buffers between them: what the executor is tested on.

Stage s computes y = w_s x of one number. Whole numbers make every result exact in fp64.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch

from dsv3_megatron.parallel.chunk_runner import Steps
from dsv3_megatron.schedule.plan import Plan

TIMEOUT_S = 20.0
# Called with a turn's name where an all-to-all would begin; what it returns, if anything, where it is waited for.
Meet = Callable[[str], Callable[[], None] | None]


class Memory:
    """Counts the objects of a rank that are alive, and the most there were at once."""

    def __init__(self) -> None:
        self.alive = self.peak = 0

    def watch(self, thing: Any) -> None:
        """Count it until it is freed."""
        self.alive += 1
        self.peak = max(self.peak, self.alive)
        weakref.finalize(thing, self._gone)

    def _gone(self) -> None:
        self.alive -= 1


class Held:
    """What a stage keeps of a micro-batch."""

    def __init__(self, input_: torch.Tensor) -> None:
        self.input = input_
        self.grad: torch.Tensor | None = None


def sample(direction: int, microbatch: int) -> float:
    """The number that enters the pipeline; another for each micro-batch of the step."""
    return float(2 * microbatch + direction + 1)


def stage_weight(stage: int) -> float:
    """Of a stage, +-1 or +-3: products stay small whole numbers."""
    return (1.0, -1.0, 3.0, 1.0, -1.0)[stage % 5]


class MultiplyingStage:
    """y = w x, in some steps.

    Args:
        plan: Says what the stage is.
        rank: Its rank.
        chunk: Its number there.
        num_steps: Turns that a pass takes besides the last.
        memory: Of what the stages of this rank hold.
        meet: Each turn's all-to-all.
    """

    def __init__(self, plan: Plan, rank: int, chunk: int, *, num_steps: int = 1, memory: Memory | None = None,
                 meet: Meet = lambda name: None) -> None:
        self.place = plan.placement[rank][chunk]
        self.is_last = self.place.stage == plan.num_stages - 1
        self.num_steps, self.memory, self.meet = num_steps, memory or Memory(), meet
        self.weight, self.weight_grad = stage_weight(self.place.stage), 0.0
        self.loss = 0.0
        self.held: dict[int, Held] = {}

    def forward_steps(self, microbatch: int, input_SBH: torch.Tensor | None) -> Steps:
        """Multiply."""
        if input_SBH is None:
            assert self.place.stage == 0
            input_SBH = torch.full((1,), sample(self.place.direction, microbatch), dtype=torch.float64)
        assert microbatch not in self.held
        held = self.held[microbatch] = Held(input_SBH)
        self.memory.watch(held)
        for step in range(self.num_steps):
            yield from self._turn(f"F{self.place} {microbatch} {step}")
        output = self.weight * input_SBH
        if not self.is_last:
            return output
        self.loss += output.item()
        return None

    def backward_steps(self, microbatch: int, grad_SBH: torch.Tensor | None, *, defer_weights: bool) -> Steps:
        """The gradient of x; that of w is always left, as by a stage without transfers."""
        assert (grad_SBH is None) == self.is_last
        self.held[microbatch].grad = grad_SBH if grad_SBH is not None else torch.ones(1, dtype=torch.float64)
        for step in range(self.num_steps):
            yield from self._turn(f"B{self.place} {microbatch} {step}")
        grad = self.held[microbatch].grad
        assert grad is not None
        return self.weight * grad if self.place.stage > 0 else None

    def _turn(self, name: str) -> Generator[None, None, None]:
        finish = self.meet(name)
        yield
        if finish is not None:
            finish()

    def backward_weight(self, microbatch: int) -> None:
        """Add the gradient of w."""
        held = self.held.pop(microbatch)
        assert held.grad is not None
        self.weight_grad += (held.grad * held.input).item()


def expected_weight_grad(plan: Plan, place: Any) -> float:
    """Of one stage, by hand: the sum over its micro-batches of x times all other weights."""
    others = 1.0
    for stage in range(plan.num_stages):
        if stage != place.stage:
            others *= stage_weight(stage)
    return others * sum(sample(place.direction, microbatch) for microbatch in range(plan.microbatches_per_chunk))


class _Message:
    def __init__(self) -> None:
        self.tensor: torch.Tensor | None = None
        self.is_met = threading.Event()

    def wait(self) -> torch.Tensor:
        """As of an Arrival."""
        if not self.is_met.wait(TIMEOUT_S):
            raise TimeoutError("the other side never came")
        assert self.tensor is not None
        tensor, self.tensor = self.tensor, None
        return tensor


class Rendezvous:
    """Messages between threads: one is there when both its send and its receive have been posted, in their order."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.sends: dict[tuple[int, int], deque[tuple[torch.Tensor, threading.Event]]] = {}
        self.receives: dict[tuple[int, int], deque[_Message]] = {}

    def match(self, pair: tuple[int, int]) -> None:
        """Meet what waits on both sides; called with the lock."""
        sends, receives = self.sends.setdefault(pair, deque()), self.receives.setdefault(pair, deque())
        while sends and receives:
            (tensor, is_sent), message = sends.popleft(), receives.popleft()
            message.tensor = tensor
            message.is_met.set()
            is_sent.set()


class ThreadTransport:
    """One rank's end of a Rendezvous."""

    def __init__(self, rendezvous: Rendezvous, rank: int) -> None:
        self.rendezvous, self.rank = rendezvous, rank
        self.unfinished: list[threading.Event] = []

    def send(self, tensor: torch.Tensor, destination: int, length: int = 1) -> None:
        """As of a Transport."""
        is_sent = threading.Event()
        self.unfinished.append(is_sent)
        pair = (self.rank, destination)
        with self.rendezvous.lock:
            self.rendezvous.sends.setdefault(pair, deque()).append((tensor, is_sent))
            self.rendezvous.match(pair)

    def receive(self, source: int, length: int = 1) -> _Message:
        """As of a Transport."""
        message, pair = _Message(), (source, self.rank)
        with self.rendezvous.lock:
            self.rendezvous.receives.setdefault(pair, deque()).append(message)
            self.rendezvous.match(pair)
        return message

    def flush(self) -> None:
        """As of a Transport."""
        for is_sent in self.unfinished:
            if not is_sent.wait(TIMEOUT_S):
                raise TimeoutError("the other side never came")
        self.unfinished.clear()


class StrictThreadTransport(ThreadTransport):
    """A send blocks until it is received: what a transport without any buffer does."""

    def send(self, tensor: torch.Tensor, destination: int, length: int = 1) -> None:
        """As of a Transport."""
        super().send(tensor, destination, length)
        self.flush()


def run_threads(functions: Sequence[Callable[[], None]]) -> None:
    """Run functions at once; the first error of any is raised here."""
    errors: list[BaseException] = []

    def guarded(function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(function,), daemon=True) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
