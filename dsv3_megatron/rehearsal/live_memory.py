"""Device memory of a rehearsed rank: every tensor's coming and going, in order, and what was alive at the most.

Bytes are those of tensors. A GPU's allocator gives each a multiple of 512, which `allocated` counts; what it splits,
caches and cannot use is not seen.
"""

from __future__ import annotations

import functools
import weakref
from array import array
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass

import torch

from dsv3_megatron.rehearsal.source_lines import source_line

BLOCK = 512
# Components of a rank's memory, named as the planner's (planning/memory/estimate.py).
PARAMETERS, GRADIENTS, OPTIMIZER, BUFFERS = "parameters", "gradients", "optimizer", "buffers"
FP8_WEIGHTS, ACTIVATIONS, WORKING, COMMUNICATION = "FP8 weights", "activations", "working", "communication"
COMPONENTS = (PARAMETERS, GRADIENTS, OPTIMIZER, BUFFERS, FP8_WEIGHTS, ACTIVATIONS, WORKING, COMMUNICATION)


@dataclass(frozen=True)
class Label:
    """What a piece of memory is.

    Attributes:
        component: One of COMPONENTS; "" where it follows from the moment.
        line: Line of the library that allocated it.
        operation: Operation that did.
    """

    component: str
    line: str
    operation: str


# Few lines allocate many times.
_label = functools.lru_cache(maxsize=None)(Label)


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
        # Moments: when each piece came, when passes began, when what another rank sent was there, and
        # when a tensor was sent to one.
        self._came = array("q")
        self._passes = array("q")
        self._arrived: dict[int, int] = {}
        self._sent: dict[int, int] = {}

    def see(self, tensor: torch.Tensor, operation: str) -> None:
        """Note the memory of a tensor that an operation gave, unless it is known already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        found = self._pieces.get(key)
        if found is not None and found[0]() is storage:
            return
        piece = len(self.sizes)
        self.sizes.append(storage.nbytes())
        self.labels.append(_label("", source_line(), operation))
        self._came.append(len(self.events))
        self.events.append(piece)

        def gone(_: object, key: int = key, piece: int = piece) -> None:
            self.events.append(-piece - 1)
            if self._pieces.get(key, (None, -1))[1] == piece:
                del self._pieces[key]

        self._pieces[key] = (weakref.ref(storage, gone), piece)

    def pulse(self, size: int, operation: str) -> None:
        """Note memory that an operation takes for itself, and gives back when it is done."""
        piece = len(self.sizes)
        self.sizes.append(size)
        self.labels.append(_label("", source_line(), operation))
        self._came.append(len(self.events))
        self.events.extend((piece, -piece - 1))

    def name(self, tensor: torch.Tensor, component: str) -> None:
        """Say what a tensor's memory is, from its beginning on."""
        found = self._pieces.get(tensor.untyped_storage()._cdata)
        if found is not None:
            old = self.labels[found[1]]
            self.labels[found[1]] = _label(component, old.line, old.operation)

    def begin_pass(self) -> None:
        """A pass of a micro-batch begins: what it makes is working memory until the next one begins."""
        self._passes.append(self.now)

    def receive(self, tensor: torch.Tensor) -> None:
        """Note that a tensor is on its way from another rank."""
        self.name(tensor, COMMUNICATION)

    def arrived(self, tensor: torch.Tensor) -> None:
        """Note that a tensor of another rank is there and a pass has it."""
        found = self._pieces.get(tensor.untyped_storage()._cdata)
        if found is not None:
            self._arrived[found[1]] = self.now

    def sent(self, tensor: torch.Tensor) -> None:
        """Note that a tensor is on its way to another rank from here on."""
        found = self._pieces.get(tensor.untyped_storage()._cdata)
        if found is not None:
            self._sent[found[1]] = self.now

    @property
    def now(self) -> int:
        """Number of events so far: a moment to ask about later."""
        return len(self.events)

    def peak(self, start: int, end: int, *, is_repeated: bool = True) -> MemoryPeak:
        """Most memory between two moments.

        Args:
            start: First moment.
            end: Last moment.
            is_repeated: Whether what came in between and stayed is taken to have been there from the first on, and
                what was there and went not at all. A first step makes what all later ones find, such as the
                optimizer's state; so this is the peak of a later step.
        """
        stays = self._alive(end) if is_repeated else set()
        alive = set(stays) if is_repeated else self._alive(start)
        level = sum(self.sizes[piece] for piece in alive)
        blocks = sum(block(self.sizes[piece]) for piece in alive)
        best, best_blocks, best_at = level, blocks, -1
        passing = set() if is_repeated else set(alive)
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
        at = self.labels[self.events[best_at]] if best_at >= 0 else Label("", "", "")
        return MemoryPeak(best, best_blocks, at, self._by_label(alive, stays, start, best_at))

    def _alive(self, end: int) -> set[int]:
        alive: set[int] = set()
        for event in self.events[:end]:
            alive.add(event) if event >= 0 else alive.discard(-event - 1)
        return alive

    def _by_label(self, alive: set[int], stays: set[int], start: int, at: int) -> dict[Label, int]:
        for index in range(start, at + 1):
            event = self.events[index]
            if event >= 0:
                alive.add(event)
            elif -event - 1 not in stays:
                alive.discard(-event - 1)
        total: Counter[Label] = Counter()
        for piece in alive:
            total[self._label_at(piece, at)] += self.sizes[piece]
        return dict(total.most_common())

    def _label_at(self, piece: int, moment: int) -> Label:
        """What a piece is at a moment: some of it is not the same from its beginning to its end."""
        label = self.labels[piece]
        if label.component not in ("", COMMUNICATION):
            return label
        if label.component == COMMUNICATION and self._arrived.get(piece, moment + 1) > moment:
            return label
        if self._sent.get(piece, moment + 1) <= moment:
            return _label(COMMUNICATION, label.line, label.operation)
        began = bisect_right(self._passes, moment) - 1
        is_kept = began >= 0 and self._came[piece] < self._passes[began]
        return _label(ACTIVATIONS if is_kept else WORKING, label.line, label.operation)

    def total_at(self, moment: int) -> int:
        """Bytes alive at a moment."""
        return sum(self.sizes[piece] for piece in self._alive(moment))
