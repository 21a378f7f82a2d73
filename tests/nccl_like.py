"""A torch.distributed backend for CPUs that makes programs wait where NCCL does, so that what hangs there hangs here.

gloo forgives much: its messages are matched whatever the order in which they were issued. NCCL does not. What is
issued here to a group returns at once and runs later on a stream of the group, one operation after the other, in the
order of issue. A send has no buffer: it is done only when its receive has begun. The first operation of a group blocks
the process that issues it until the others come to theirs, for NCCL makes the communicator then.

Two backends, as torch has two:

    nccl_like         one stream and one communicator for a group ("nccl" of torch 2.15)
    nccl_like_pairs   and one of each for every pair of ranks that sends and receives ("nccl" of torch 2.11 to 2.14)

gloo, inside, carries the values. `register()` makes both known to torch.
"""

from __future__ import annotations

import datetime
import os
import queue
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch._C._distributed_c10d import Backend, ProcessGroupGloo, Work

ONE_STREAM, STREAM_PER_PAIR = "nccl_like", "nccl_like_pairs"

# Everything that torch may call on a group besides send, recv and shutdown; same names and arguments in gloo.
_COLLECTIVES = (
    "broadcast", "allreduce", "allreduce_coalesced", "reduce", "allgather", "all_gather_single", "allgather_coalesced",
    "all_gather_single_coalesced", "gather", "scatter", "reduce_scatter", "reduce_scatter_single",
    "reduce_scatter_single_coalesced", "all_to_all_single", "alltoall", "barrier")
_LEFT_BEHIND_S = 2.0
# Of each message gloo carries two: the receiver's word that it has begun, then the tensor.
_TAGS_PER_MESSAGE = 2


class _Operation(Work):
    """An operation that was issued; torch waits for it as for others."""

    def __init__(self, run: Callable[[], Any], tensors: Any) -> None:
        super().__init__()
        self.run, self.tensors = run, tensors  # which live at least as long as the operation
        self.error: Exception | None = None
        self.is_over = threading.Event()

    def wait(self, timeout: datetime.timedelta | None = None) -> bool:
        """Wait until it is done.

        Raises:
            RuntimeError: gloo's, where the operation failed or took too long, or an earlier one of its stream did.
        """
        self.is_over.wait()
        if self.error is not None:
            raise self.error
        return True


class _Stream:
    """Runs operations one after the other on a thread of its own; after a failure all later ones fail too."""

    def __init__(self, name: str) -> None:
        self._operations: queue.SimpleQueue[_Operation | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def issue(self, run: Callable[[], Any], tensors: Any) -> _Operation:
        """Put an operation behind the others; returns torch's handle of it."""
        operation = _Operation(run, tensors)
        self._operations.put(operation)
        return operation

    def end(self) -> None:
        """Run what was issued, then end; what waits for good is left behind."""
        self._operations.put(None)
        self._thread.join(_LEFT_BEHIND_S)

    def _run(self) -> None:
        error: Exception | None = None
        while (operation := self._operations.get()) is not None:
            try:
                if error is None:
                    operation.run()
            except Exception as raised:  # noqa: BLE001 - raised where the operation is waited for
                error = raised
            operation.error = error
            operation.is_over.set()


class NcclLikeBackend(Backend):
    """A group whose operations run as on NCCL.

    Args:
        store: Store of the group's ranks.
        rank: This process's rank in the group.
        size: Ranks of the group.
        timeout: Time that an operation may take.
        has_pairs: Each pair of ranks has a stream and a first contact of its own for what it sends and receives.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout: datetime.timedelta, *, has_pairs: bool) -> None:
        super().__init__(rank, size)
        self._store, self._timeout, self._has_pairs = store, timeout, has_pairs
        self._gloo = ProcessGroupGloo(torch.distributed.PrefixStore("gloo", store), rank, size, timeout)
        self._streams: dict[str, _Stream] = {}
        self._num_messages: Counter[tuple[int, int]] = Counter()

    def getBackendName(self) -> str:
        """What torch calls the backend."""
        return STREAM_PER_PAIR if self._has_pairs else ONE_STREAM

    def send(self, tensors: list[torch.Tensor], destination: int, tag: int) -> Any:
        """Begin to send; done when the receive has begun and has the tensor. The tag is ignored, as by NCCL."""
        ready, data = self._tags(self.rank(), destination)

        def run() -> None:
            self._gloo.recv([torch.empty(1)], destination, ready).wait()
            self._gloo.send(tensors, destination, data).wait()

        return self._stream_with(destination).issue(run, tensors)

    def recv(self, tensors: list[torch.Tensor], source: int, tag: int) -> Any:
        """Begin to receive."""
        ready, data = self._tags(source, self.rank())

        def run() -> None:
            self._gloo.send([torch.zeros(1)], source, ready).wait()
            self._gloo.recv(tensors, source, data).wait()

        return self._stream_with(source).issue(run, tensors)

    def collective(self, name: str, arguments: tuple[Any, ...]) -> Any:
        """Begin a collective of gloo's by its name."""
        operation = getattr(self._gloo, name)
        return self._stream("all", range(self.size())).issue(lambda: operation(*arguments).wait(), arguments)

    def shutdown(self) -> None:
        """Run what was issued and end."""
        for stream in self._streams.values():
            stream.end()

    def _tags(self, source: int, destination: int) -> tuple[int, int]:
        number = self._num_messages[source, destination]
        self._num_messages[source, destination] += 1
        return _TAGS_PER_MESSAGE * number, _TAGS_PER_MESSAGE * number + 1

    def _stream_with(self, peer: int) -> _Stream:
        """The stream of what goes between this rank and another one."""
        if not self._has_pairs:
            return self._stream("all", range(self.size()))
        low, high = sorted((self.rank(), peer))
        return self._stream(f"{low}-{high}", (low, high))

    def _stream(self, name: str, ranks: Any) -> _Stream:
        """A stream by name; where it is new, when all of its ranks have come for it."""
        if name not in self._streams:
            self._store.set(f"contact/{name}/{self.rank()}", "here")
            self._store.wait([f"contact/{name}/{rank}" for rank in ranks], self._timeout)
            self._streams[name] = _Stream(f"stream {name} of {self.getBackendName()}")
        return self._streams[name]


def _forward(name: str) -> Callable[..., Any]:
    def run(self: NcclLikeBackend, *arguments: Any) -> Any:
        return self.collective(name, arguments)

    return run


for _name in _COLLECTIVES:
    setattr(NcclLikeBackend, _name, _forward(_name))

# Groups that torch's C++ part holds, whose Python part must live as long.
_alive: list[NcclLikeBackend] = []


def register() -> None:
    """Make both backends known to torch, for tensors on the CPU; safe to call again."""
    # torch's flight recorder, which it attaches to groups of unknown backends, crashes on those written in Python.
    os.environ["TORCH_FR_BUFFER_SIZE"] = "0"

    def creator(has_pairs: bool) -> Callable[..., NcclLikeBackend]:
        def create(store: Any, rank: int, size: int, timeout: datetime.timedelta) -> NcclLikeBackend:
            _alive.append(NcclLikeBackend(store, rank, size, timeout, has_pairs=has_pairs))
            return _alive[-1]

        return create

    for name, has_pairs in ((ONE_STREAM, False), (STREAM_PER_PAIR, True)):
        if name not in torch.distributed.Backend.backend_list:
            torch.distributed.Backend.register_backend(name, creator(has_pairs), devices=["cpu"])
