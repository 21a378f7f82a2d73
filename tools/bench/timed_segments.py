"""Segments whose compute takes a known time, and all-to-alls that do: to see what hides behind what.

A stand-in stage has the shape of a stage of MoE layers, attention -> dispatch -> experts -> combine, and runs on the
tape that runs the real one; its compute sleeps. The channel makes each transfer last a given time, one transfer at a
time as on a network card, whatever the machine is doing. On a wall clock a sleeping process leaves its core to others,
so that many ranks fit on few cores; on a virtual clock time is counted only, and the result is exact.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from dsv3_megatron.model.stage.tape import Tape, Value
from dsv3_megatron.model.stage.weight_gradients import weight_grad_deferral
from dsv3_megatron.parallel.exchange import PostAllToAll, Posted, Splits
from dsv3_megatron.parallel.hops import post_hops


class Clock(Protocol):
    """Time in seconds."""

    def now(self) -> float:
        """The time."""
        ...

    def sleep_until(self, moment: float) -> None:
        """Let time pass."""
        ...


class WallClock:
    """The machine's."""

    def now(self) -> float:
        """Seconds since some moment."""
        return time.perf_counter()

    def sleep_until(self, moment: float) -> None:
        """Sleep."""
        while (left := moment - time.perf_counter()) > 0:
            time.sleep(left)


class VirtualClock:
    """Counts sleeps; computing costs nothing."""

    def __init__(self) -> None:
        self._now = 0.0

    def now(self) -> float:
        """The sum of sleeps."""
        return self._now

    def sleep_until(self, moment: float) -> None:
        """Jump."""
        self._now = max(self._now, moment)


@dataclass
class _TimedTransfer:
    transfer: Posted
    end: float
    clock: Clock

    def wait(self) -> torch.Tensor:
        received = self.transfer.wait()
        self.clock.sleep_until(self.end)
        return received


@dataclass
class Channel:
    """Transfers that take a known time, one after the other on each link; is a `PostAllToAll`.

    Attributes:
        clock: Of the time.
        post: Does the transfer itself, beside.
        duration_s: Of a transfer of rows of experts' inputs or outputs, over all links; their gates take no time.
        num_transfers: Of those, so far.
        node_group: Ranks of a node, whose transfers have a link of their own; None: there is one link.
        node_share: The part of `duration_s` within the node.
    """

    clock: Clock
    post: PostAllToAll
    duration_s: float = 0.0
    num_transfers: int = 0
    node_group: torch.distributed.ProcessGroup | None = None
    node_share: float = 0.0
    _free_at: dict[bool, float] = field(default_factory=lambda: defaultdict(float), repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __call__(self, rows: torch.Tensor, splits: Splits) -> Posted:
        """Start a transfer, behind those under way."""
        transfer = self.post(rows, splits)
        is_timed = rows.dim() == 2
        is_within = self.node_group is not None and splits.group is self.node_group
        duration_s = self.duration_s * (self.node_share if is_within else 1.0 - self.node_share) * is_timed
        with self._lock:  # a thread passes rows on
            self.num_transfers += is_timed and not is_within
            self._free_at[is_within] = max(self._free_at[is_within], self.clock.now()) + duration_s
            return _TimedTransfer(transfer, self._free_at[is_within], self.clock)


@dataclass(frozen=True)
class TwoLevels:
    """Rows over the network, then within a node; home the other way round. Is a `Carrier`.

    Attributes:
        hops: Splits of both transfers, in the order of the way there.
    """

    hops: tuple[Splits, Splits]

    def start(self, post: PostAllToAll, *tensors: torch.Tensor) -> _Arrived:
        """Start on the way there."""
        (rows,) = tensors
        return _Arrived(post_hops(rows, self.hops, lambda came: came, post))

    def start_backward(self, post: PostAllToAll, *grads: torch.Tensor | None) -> _Arrived:
        """Start on the way back."""
        (grad,) = grads
        assert grad is not None
        return _Arrived(post_hops(grad, self.back().hops, lambda came: came, post))

    def back(self) -> TwoLevels:
        """The way home."""
        network, node = self.hops
        return TwoLevels((node.reversed(), network.reversed()))


@dataclass(frozen=True)
class _Arrived:
    transfer: Posted

    def wait(self) -> tuple[torch.Tensor, ...]:
        return (self.transfer.wait(),)


@dataclass(frozen=True)
class Costs:
    """Seconds of a segment's forward, its backward for inputs, and its backward for weights."""

    forward: float
    inputs: float
    weights: float


@dataclass(frozen=True)
class TimedStage:
    """A chunk of MoE layers whose compute sleeps.

    Attributes:
        num_layers: Layers.
        attention: Costs of a layer's attention.
        experts: Costs of its experts.
        clock: Of the sleeps.
        post: Starts a transfer.
        splits: Of the rows, there; they go back with the numbers swapped.
        levels: Carries the rows over two links instead; None: there is one.
    """

    num_layers: int
    attention: Costs
    experts: Costs
    clock: Clock
    post: PostAllToAll
    splits: Splits
    levels: TwoLevels | None = None
    passes: dict[int, tuple[Tape, Value, Value]] = field(default_factory=dict)

    @property
    def compute_s(self) -> float:
        """Of a micro-batch's forward and backward."""
        return self.num_layers * sum(costs.forward + costs.inputs + costs.weights
                                     for costs in (self.attention, self.experts))

    def forward_steps(self, microbatch: int, input_RH: torch.Tensor | None) -> Generator[None, None, torch.Tensor]:
        """As of `ChunkRunner`."""
        assert input_RH is not None
        tape = Tape(is_recording=True, post=self.post)
        rows = given = tape.value(input_RH)
        for _ in range(self.num_layers):
            (rows,) = tape.run(lambda x: _Work.apply(x, self.attention, self.clock, weight_grad_deferral()), rows)
            (rows,) = yield from (tape.exchange(rows, splits=self.splits) if self.levels is None else
                                  tape.carry(self.levels, rows))
            (rows,) = tape.run(lambda x: _Work.apply(x, self.experts, self.clock, weight_grad_deferral()), rows)
            (rows,) = yield from (tape.exchange(rows, splits=self.splits.reversed()) if self.levels is None else
                                  tape.carry(self.levels.back(), rows))
        self.passes[microbatch] = (tape, given, rows)
        return rows.tensor

    def backward_steps(self, microbatch: int, grad_RH: torch.Tensor | None, *, defer_weights: bool
                       ) -> Generator[None, None, torch.Tensor | None]:
        """As of `ChunkRunner`."""
        tape, given, output = self.passes[microbatch]
        assert output.slot is not None and given.slot is not None and grad_RH is not None
        output.slot.add(grad_RH)
        yield from tape.backward(defer_weights=defer_weights)
        return given.slot.take()

    def backward_weight(self, microbatch: int) -> None:
        """As of `ChunkRunner`."""
        self.passes.pop(microbatch)[0].weights.compute()


class _Work(torch.autograd.Function):
    """Doubles its input, and takes its time forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, costs: Costs, clock: Clock, defer: Any) -> torch.Tensor:
        ctx.costs, ctx.clock, ctx.defer = costs, clock, defer
        clock.sleep_until(clock.now() + costs.forward)
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        costs, clock = ctx.costs, ctx.clock
        clock.sleep_until(clock.now() + costs.inputs)
        ctx.defer(lambda: clock.sleep_until(clock.now() + costs.weights))
        return 2 * grads[0], None, None, None
