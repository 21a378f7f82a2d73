"""How tensors get from one pipeline rank to another: point-to-point messages without names, in order.

The n-th tensor that rank a sends rank b is the n-th that b receives from a. The order is that of `with_transfers`, the
same on both sides, so neither tags (which NCCL ignores) nor a handshake is needed.

Messages of a to b and of b to a go over two communicators, one for sends to higher ranks and one for sends to lower
ones. Between two ranks a communicator then has one direction. With NCCL, where operations on a communicator wait for
one another, a receive can so be posted long before its tensor is made: nothing that its own rank has yet to send is
behind it, and a cycle of ranks that wait cannot arise whatever the order in which the two directions are posted.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Protocol

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from dsv3_megatron.parallel.groups import pipeline_twin
from dsv3_megatron.schedule.transfers import MAX_UNFINISHED_SENDS


class Arrival(Protocol):
    """A tensor on its way to this rank."""

    def wait(self) -> torch.Tensor:
        """The tensor, when it is there."""
        ...


class Transport(Protocol):
    """Messages between pipeline ranks; each pair of ranks has an order of its own in each direction."""

    def send(self, tensor: torch.Tensor, destination: int) -> None:
        """Begin to send; the tensor is kept until it is sent."""
        ...

    def receive(self, source: int) -> Arrival:
        """Be ready for the next tensor from a rank."""
        ...

    def flush(self) -> None:
        """Wait until everything is sent."""
        ...


class GroupTransport:
    """Messages over two communicators of torch.distributed, NCCL or gloo.

    Args:
        ascending: The pipeline's group, for sends to higher ranks.
        descending: Another group of the same ranks, for sends to lower ranks.
        shape: Shape of every tensor that is sent.
        dtype: Dtype of every tensor that is sent.
        device: Device of every tensor that is sent.
    """

    def __init__(self, ascending: torch.distributed.ProcessGroup, descending: torch.distributed.ProcessGroup, *,
                 shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self._groups = (ascending, descending)
        self.rank = ascending.rank()
        self.shape, self.dtype, self.device = shape, dtype, device
        self._unfinished: dict[int, deque[tuple[Any, torch.Tensor]]] = {}

    def send(self, tensor: torch.Tensor, destination: int) -> None:
        """Begin to send; the tensor is kept until it is sent.

        Raises:
            ValueError: the tensor has not the shape and dtype that the other side expects.
        """
        if tuple(tensor.shape) != self.shape or tensor.dtype != self.dtype:
            raise ValueError(f"a stage's output is {tensor.dtype} {tuple(tensor.shape)}; between stages go "
                             f"{self.dtype} {self.shape}, by the run's seq_length, micro_batch_size and hidden_size")
        tensor = tensor.contiguous()
        work = torch.distributed.isend(tensor, group=self._groups[destination < self.rank], group_dst=destination)
        unfinished = self._unfinished.setdefault(destination, deque())
        unfinished.append((work, tensor))
        while unfinished and (len(unfinished) > MAX_UNFINISHED_SENDS or unfinished[0][0].is_completed()):
            unfinished.popleft()[0].wait()

    def receive(self, source: int) -> Arrival:
        """Be ready for the next tensor from a rank."""
        tensor = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        return _Arrival(torch.distributed.irecv(tensor, group=self._groups[source > self.rank], group_src=source),
                        tensor)

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
    """The two communicators of this rank's pipeline; made by every rank at once.

    Args:
        groups: The run's.
    """

    def __init__(self, groups: ProcessGroupCollection) -> None:
        self.ascending = groups.pp
        self.descending = pipeline_twin(groups)

    def transport(self, *, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> GroupTransport:
        """Make the transport for tensors of one kind; those of several kinds must not be under way at once."""
        return GroupTransport(self.ascending, self.descending, shape=shape, dtype=dtype, device=device)
