"""Rows of tensors exchanged between ranks while something else is computed.

Autograd knows nothing of these transfers: who posts one forward posts the transfer of the gradients backward, which is
the same with the numbers of rows swapped.

On CUDA, NCCL runs the transfer on a stream of its own, which starts when the current stream has come to the call, and
`wait` makes the current stream, not the host, wait for its end. (Run with gloo only.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class Splits:
    """Numbers of rows that go to and come from each rank of a group.

    Attributes:
        sent: Rows to each rank, in its order.
        received: Rows from each rank.
        group: The ranks.
    """

    sent: tuple[int, ...]
    received: tuple[int, ...]
    group: torch.distributed.ProcessGroup

    @classmethod
    def of(cls, sent: Sequence[int], received: Sequence[int], group: torch.distributed.ProcessGroup) -> Splits:
        """Make splits from any numbers: lists, arrays, tensors on the host."""
        return cls(tuple(map(int, sent)), tuple(map(int, received)), group)

    def reversed(self) -> Splits:
        """The splits of the way back: what was received is sent."""
        return Splits(self.received, self.sent, self.group)


class Posted(Protocol):
    """A transfer under way."""

    def wait(self) -> torch.Tensor:
        """Wait for the transfer and give what was received; once."""
        ...


class PostAllToAll(Protocol):
    """Starts a transfer: `post_all_to_all`, or what stands in for it."""

    def __call__(self, rows: torch.Tensor, splits: Splits) -> Posted:
        """Start sending rows [sum(sent), ...]; [sum(received), ...] will come."""
        ...


class _AllToAll:
    def __init__(self, rows: torch.Tensor, splits: Splits) -> None:
        self.rows: torch.Tensor | None = rows.contiguous()
        self.received = rows.new_empty((sum(splits.received), *rows.shape[1:]))
        work = torch.distributed.all_to_all_single(
            self.received, self.rows, list(splits.received), list(splits.sent), group=splits.group, async_op=True)
        assert work is not None, "this process is in the group"
        self.work = work

    def wait(self) -> torch.Tensor:
        self.work.wait()
        self.rows = None
        return self.received


def post_all_to_all(rows: torch.Tensor, splits: Splits) -> Posted:
    """Start an all-to-all of rows.

    Args:
        rows: [sum(sent), ...], by receiving rank; without gradients. Must not change before `wait` has returned.
        splits: Numbers of rows that go to and come from each rank.
    """
    return _AllToAll(rows, splits)
