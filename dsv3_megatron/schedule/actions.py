"""The words of a pipeline schedule: one operation on one chunk, and the actions a rank runs one after the other.

A chunk is the part of the model that one pipeline stage holds. A rank numbers its chunks from 0, and the micro-batches
of a chunk from 0; which stage a chunk is, the plan says.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple


class Kind(StrEnum):
    """What is done with a micro-batch on a chunk. The backward pass is done whole, or in two parts.

    The input part makes the gradient that the previous stage waits for; the weight part may run any time later.
    """

    FORWARD = "F"
    BACKWARD_INPUT = "I"
    BACKWARD_WEIGHT = "W"
    BACKWARD = "B"


class Operation(NamedTuple):
    """One kind of work on one micro-batch by one chunk of a rank."""

    kind: Kind
    chunk: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind}{self.chunk}.{self.microbatch}"

    def as_json(self) -> dict[str, Any]:
        """`{"op": "F", "chunk": 0, "mb": 3}`."""
        return {"op": str(self.kind), "chunk": self.chunk, "mb": self.microbatch}


@dataclass(frozen=True, slots=True)
class Action:
    """What a rank runs at once: one operation, or a forward and a full backward that hide each other's communication.

    Attributes:
        operations: One, or two of which the first is a forward and the second a full backward.
    """

    operations: tuple[Operation, ...]

    @property
    def is_overlapped(self) -> bool:
        """Whether the action is a forward & backward pair."""
        return len(self.operations) == 2

    def __str__(self) -> str:
        return " & ".join(map(str, self.operations))

    def as_json(self) -> dict[str, Any]:
        """An operation's object, or `{"op": "FB", "f": {...}, "b": {...}}` with two of them."""
        if not self.is_overlapped:
            return self.operations[0].as_json()
        forward, backward = self.operations
        return {"op": "FB", "f": forward.as_json(), "b": backward.as_json()}
