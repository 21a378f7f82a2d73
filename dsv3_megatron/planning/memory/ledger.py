"""Lifetimes of tensors: what is alive when, and the most that is alive at once.

A pass over a part of the model is written down as it runs: `make` where a tensor comes into being, `keep` where another
reference to it is taken, `drop` where one goes. Nothing is allocated.

Usage:
    ledger = Ledger()
    output = ledger.make("output", 4096)
    ledger.drop(output)
    ledger.peak                    # 4096
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple


class Turn(NamedTuple):
    """What runs without a pause: the most that is alive in it, and what is alive after it, both beyond its start."""

    peak: int
    net: int


class Tensor:
    """A tensor that a ledger counts.

    Attributes:
        name: What the tensor is, for a reader.
        size: Length in bytes.
        references: Number of users; the tensor is alive while there are any.
        recomputation: Recomputation that makes the tensor again; None: it is kept.
        is_held: The operation that made the tensor keeps it as it is.
    """

    __slots__ = ("is_held", "name", "recomputation", "references", "size")

    def __init__(self, name: str, size: int) -> None:
        self.name, self.size, self.references = name, size, 1
        self.recomputation: Recomputation | None = None
        self.is_held = False

    @property
    def is_at_hand(self) -> bool:
        """Whether the tensor will be there in backward in any case: held, or made again."""
        return self.is_held or self.recomputation is not None


class Recomputation:
    """Tensors that are made again in backward, all at once, instead of being kept.

    Attributes:
        tensors: Tensors that the recomputation makes.
        users: How many would have kept each.
        work: What is alive while they are made, beside them.
    """

    __slots__ = ("tensors", "users", "work")

    def __init__(self, tensors: Sequence[Tensor], work: int) -> None:
        self.tensors, self.users, self.work = tensors, [0] * len(tensors), work


class MemoryLedger:
    """Tensors that are alive now.

    Attributes:
        level: Bytes of what is alive.
        peak: The largest level since the start, or since the last `pause`.
        waiting: Weight gradients to be computed, in their order.
        defers_all: Weight gradients wait for a call of their own; otherwise a transfer that starts is a time to compute
            them.
    """

    def __init__(self) -> None:
        self._alive: set[Tensor] = set()
        self._turns: list[Turn] = []
        self.level = self.peak = self._started = 0
        self.waiting: list[Callable[[], None]] = []
        self.defers_all = False

    def make(self, name: str, size: int) -> Tensor:
        """A tensor comes into being, with one reference."""
        tensor = Tensor(name, size)
        self._alive.add(tensor)
        self.level += size
        if self.level > self.peak:
            self.peak = self.level
        return tensor

    def _revive(self, tensor: Tensor, references: int) -> None:
        tensor.references = references
        self._alive.add(tensor)
        self.level += tensor.size
        if self.level > self.peak:
            self.peak = self.level

    def keep(self, *tensors: Tensor) -> None:
        """One reference more to each for backward; to what is made again, none."""
        for tensor in tensors:
            if tensor.recomputation is None:
                tensor.references += 1
            else:
                tensor.recomputation.users[tensor.recomputation.tensors.index(tensor)] += 1

    def drop(self, *tensors: Tensor) -> None:
        """One reference less to each; a tensor goes with the last."""
        for tensor in tensors:
            tensor.references -= 1
            if not tensor.references:
                self.level -= tensor.size
                self._alive.remove(tensor)

    def make_again(self, *tensors: Tensor, work: int) -> None:
        """What is kept of these from here on is made again when it is needed, with `work` bytes beside it."""
        recomputation = Recomputation(tensors, work)
        for tensor in tensors:
            tensor.recomputation = recomputation

    def need(self, tensor: Tensor) -> None:
        """A kept tensor is used now; if it is to be made again, this happens."""
        recomputation = tensor.recomputation
        if recomputation is None:
            return
        for each, users in zip(recomputation.tensors, recomputation.users, strict=True):
            each.recomputation = None
            if users:
                self._revive(each, users)
        self.pulse(recomputation.work)

    def pulse(self, size: int) -> None:
        """Something of this size comes and goes."""
        if self.level + size > self.peak:
            self.peak = self.level + size

    def pause(self) -> None:
        """Others may run here."""
        self._turns.append(Turn(self.peak - self._started, self.level - self._started))
        self._started = self.peak = self.level

    def take_turns(self) -> tuple[Turn, ...]:
        """The turns since the last call, the one that ends here included."""
        self.pause()
        turns, self._turns = tuple(self._turns), []
        return turns

    def compute_waiting(self) -> None:
        """Compute the weight gradients that wait, each freed as it is done."""
        waiting, self.waiting = self.waiting, []
        for compute in waiting:
            compute()

    def by_name(self) -> dict[str, int]:
        """Bytes of what is alive."""
        sizes: dict[str, int] = {}
        for tensor in self._alive:
            sizes[tensor.name] = sizes.get(tensor.name, 0) + tensor.size
        return sizes


def run_turns(turns: Iterable[Turn], level: int = 0) -> Turn:
    """Turns one after the other as one; `level` is beyond the start where the first begins."""
    peak = level
    for turn in turns:
        peak = max(peak, level + turn.peak)
        level += turn.net
    return Turn(peak, level)
