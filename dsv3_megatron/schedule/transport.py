"""How tensors get from one pipeline rank to another: point-to-point messages without names, in order.

The n-th tensor that rank a sends rank b is the n-th that b receives from a. The order is that of `with_transfers`, the
same on both sides, so neither tags (which NCCL ignores) nor a handshake is needed.

Every edge, from one rank to another, has a group of its own. On a GPU what is issued to a group runs in the order in
which it was issued: a receive that is posted before its tensor is made would stop whatever its rank sends later over
the same group. On an edge a rank only sends or only receives, so nothing else is behind it. `schedule/delivery.py`
proves that no plan then hangs, and that many do with fewer groups.

A communicator is made by the first message on it, for which each side waits. So ranks send one small message over each
edge before the first step, in rounds in which a rank is at one edge at most.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch

from dsv3_megatron.parallel.communicators import ledger
from dsv3_megatron.schedule.transfers import MAX_UNFINISHED_SENDS, Edge, rounds_of_meetings


class Arrival(Protocol):
    """A tensor on its way to this rank."""

    def wait(self) -> torch.Tensor:
        """The tensor, when it is there."""
        ...


class Transport(Protocol):
    """Messages between pipeline ranks; each pair of ranks has an order of its own in each direction."""

    def send(self, tensor: torch.Tensor, destination: int, length: int = 1) -> None:
        """Begin to send; the tensor is kept until it is sent. It is `length` times as long as others."""
        ...

    def receive(self, source: int, length: int = 1) -> Arrival:
        """Be ready for the next tensor from a rank, which is `length` times as long as others."""
        ...

    def flush(self) -> None:
        """Wait until everything is sent."""
        ...


class GroupTransport:
    """Messages over groups of torch.distributed, NCCL or gloo.

    Args:
        channels: A group for each edge that this rank sends or receives over.
        shape: Shape of every tensor that is sent, but for its length: a tensor may have several times the first number.
        dtype: Dtype of every tensor that is sent.
        device: Device of every tensor that is sent.
    """

    def __init__(self, channels: PipelineChannels, *, shape: tuple[int, ...], dtype: torch.dtype,
                 device: torch.device) -> None:
        self.channels = channels
        self.shape, self.dtype, self.device = shape, dtype, device
        self._unfinished: dict[int, deque[tuple[Any, torch.Tensor]]] = {}

    def send(self, tensor: torch.Tensor, destination: int, length: int = 1) -> None:
        """Begin to send; the tensor is kept until it is sent.

        Args:
            tensor: What is sent.
            destination: Rank that receives it.
            length: How many times the length of `shape` the tensor has, as both sides know.

        Raises:
            ValueError: the tensor has not the shape and dtype that the other side expects.
        """
        shape = self._shape(length)
        if tuple(tensor.shape) != shape or tensor.dtype != self.dtype:
            raise ValueError(f"a stage's output is {tensor.dtype} {tuple(tensor.shape)}; between these stages go "
                             f"{self.dtype} {shape}, by the run's seq_length, micro_batch_size and hidden_size")
        tensor = tensor.contiguous()
        work = self.channels.isend(tensor, destination)
        unfinished = self._unfinished.setdefault(destination, deque())
        unfinished.append((work, tensor))
        while unfinished and (len(unfinished) > MAX_UNFINISHED_SENDS or unfinished[0][0].is_completed()):
            unfinished.popleft()[0].wait()

    def receive(self, source: int, length: int = 1) -> Arrival:
        """Be ready for the next tensor from a rank, of `length` times the length of `shape`."""
        tensor = torch.empty(self._shape(length), dtype=self.dtype, device=self.device)
        return _Arrival(self.channels.irecv(tensor, source), tensor)

    def _shape(self, length: int) -> tuple[int, ...]:
        return (length * self.shape[0], *self.shape[1:])

    def flush(self) -> None:
        """Wait until everything is sent."""
        for unfinished in self._unfinished.values():
            while unfinished:
                unfinished.popleft()[0].wait()


class _Arrival:
    def __init__(self, work: Any, tensor: torch.Tensor) -> None:
        self.work, self.tensor = work, tensor

    def wait(self) -> torch.Tensor:
        self.work.wait()
        return self.tensor


class PipelineChannels:
    """The groups of a pipeline's edges; made by every rank of the run at once, whether it is in a pipeline or not.

    Args:
        pipelines: Global ranks of each pipeline of the run, in the order of their stages.
        edges: Pairs of positions in a pipeline between which tensors go, from the first to the second.
        device: Device of this process, for the first messages.
    """

    def __init__(self, pipelines: Sequence[Sequence[int]], edges: Iterable[Edge], *, device: torch.device) -> None:
        own = next((ranks for ranks in pipelines if torch.distributed.get_rank() in ranks), ())
        self.rank = own.index(torch.distributed.get_rank()) if own else -1
        self._groups: dict[Edge, torch.distributed.ProcessGroup] = {}
        meetings = [edge for edges_of_round in rounds_of_meetings(edges) for edge in edges_of_round]
        for edge in meetings:
            for ranks in pipelines:
                source, destination = (ranks[position] for position in edge)
                way = "up" if source < destination else "down"
                group = ledger().group((source, destination), f"pipeline, {way}")
                if group is not None:
                    self._groups[edge] = group
        ledger().level()
        self._meet([edge for edge in meetings if edge in self._groups], device)

    def _meet(self, edges: Iterable[Edge], device: torch.device) -> None:
        """Send a small message over each edge: communicators are made now, in this order."""
        token = torch.zeros(1, device=device)
        for source, destination in edges:
            work = self.isend(token, destination) if source == self.rank else self.irecv(token, source)
            work.wait()

    def isend(self, tensor: torch.Tensor, destination: int) -> Any:
        """Begin to send a tensor to a position of the pipeline; returns torch's handle."""
        group = self._groups[self.rank, destination]
        return torch.distributed.isend(tensor, group=group, group_dst=1 - group.rank())

    def irecv(self, tensor: torch.Tensor, source: int) -> Any:
        """Begin to receive into a tensor from a position of the pipeline; returns torch's handle."""
        group = self._groups[source, self.rank]
        return torch.distributed.irecv(tensor, group=group, group_src=1 - group.rank())

    def transport(self, *, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> GroupTransport:
        """Make the transport for tensors of one kind; those of several kinds must not be under way at once."""
        return GroupTransport(self, shape=shape, dtype=dtype, device=device)
