"""Device memory of a rehearsed rank: every tensor's coming and going, in order, and what was alive at the most.

Bytes are those of tensors. A GPU's allocator gives each a multiple of 512, which `allocated` counts; what it splits,
caches and cannot use is not seen.
"""

from __future__ import annotations

import weakref
from array import array
from collections import Counter
from dataclasses import dataclass

import torch

BLOCK = 512


@dataclass(frozen=True)
class Label:
    """What a piece of memory is.

    Attributes:
        component: Kind of memory, such as "parameters"; "" for what passes make.
        line: Line of the library that allocated it.
        operation: Operation that did.
    """

    component: str
    line: str
    operation: str


@dataclass(frozen=True)
class MemoryPeak:
    """The moment with most memory.

    Attributes:
        num_bytes: Bytes of tensors.
        allocated: Bytes of tensors in blocks of 512.
        at: Label of the tensor that came last.
        by_label: Bytes of each label then.
    """

    num_bytes: int
    allocated: int
    at: Label
    by_label: dict[Label, int]


def block(size: int) -> int:
    """Bytes that a CUDA allocator takes for a tensor."""
    return (size + BLOCK - 1) // BLOCK * BLOCK


class LiveMemory:
    """Device memory of a process, as events: numbers of pieces that came (n) and went (-n - 1)."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.labels: list[Label] = []
        self.events = array("q")
        self._pieces: dict[int, tuple[weakref.ref, int]] = {}

    def see(self, tensor: torch.Tensor, label: Label) -> None:
        """Note a tensor's memory, unless it is known already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        found = self._pieces.get(key)
        if found is not None and found[0]() is storage:
            return
        piece = len(self.sizes)
        self.sizes.append(storage.nbytes())
        self.labels.append(label)
        self.events.append(piece)

        def gone(_: object, key: int = key, piece: int = piece) -> None:
            self.events.append(-piece - 1)
            if self._pieces.get(key, (None, -1))[1] == piece:
                del self._pieces[key]

        self._pieces[key] = (weakref.ref(storage, gone), piece)

    def name(self, tensor: torch.Tensor, component: str) -> None:
        """Say what a tensor's memory is, from its beginning on."""
        found = self._pieces.get(tensor.untyped_storage()._cdata)
        if found is not None:
            old = self.labels[found[1]]
            self.labels[found[1]] = Label(component, old.line, old.operation)

    @property
    def now(self) -> int:
        """Number of events so far: a moment to ask about later."""
        return len(self.events)

    def peak(self, start: int, end: int) -> MemoryPeak:
        """Most memory between two moments, if what came in between and stayed had been there from the first on.

        A first step makes what all later ones find, such as the optimizer's state; so this is the peak of a later
        step. What was there at the first moment and went in between is left out for the same reason.
        """
        stays = self._alive(end)
        level = sum(self.sizes[piece] for piece in stays)
        blocks = sum(block(self.sizes[piece]) for piece in stays)
        best, best_blocks, best_at = level, blocks, -1
        passing: set[int] = set()
        for index in range(start, end):
            event = self.events[index]
            piece = event if event >= 0 else -event - 1
            if event >= 0 and piece not in stays:
                passing.add(piece)
                level, blocks = level + self.sizes[piece], blocks + block(self.sizes[piece])
                if level > best:
                    best, best_at = level, index
                best_blocks = max(best_blocks, blocks)
            elif event < 0 and piece in passing:
                passing.remove(piece)
                level, blocks = level - self.sizes[piece], blocks - block(self.sizes[piece])
        return MemoryPeak(best, best_blocks, self.labels[self.events[best_at]] if best_at >= 0 else Label("", "", ""),
                    self._by_label(stays, start, best_at))

    def _alive(self, end: int) -> set[int]:
        alive: set[int] = set()
        for event in self.events[:end]:
            alive.add(event) if event >= 0 else alive.discard(-event - 1)
        return alive

    def _by_label(self, stays: set[int], start: int, at: int) -> dict[Label, int]:
        alive = set(stays)
        for index in range(start, at + 1):
            event = self.events[index]
            if event >= 0:
                alive.add(event)
            elif -event - 1 not in stays:
                alive.discard(-event - 1)
        total: Counter[Label] = Counter()
        for piece in alive:
            total[self.labels[piece]] += self.sizes[piece]
        return dict(total.most_common())

    def total_at(self, moment: int) -> int:
        """Bytes alive at a moment."""
        return sum(self.sizes[piece] for piece in self._alive(moment))
