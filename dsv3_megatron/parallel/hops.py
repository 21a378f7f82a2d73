"""Rows that go on to other ranks when they have come: two transfers with a few operations between, as one.

Whoever posts the first goes on computing. The second one starts as soon as the first is there: on a GPU on a stream of
its own, on which nothing waits but the GPU; on a CPU by a thread that does nothing else. (Run with gloo only.)

Each group's transfers are posted in the order in which the journeys were, on every rank: on a GPU by the one thread
that posts everything, on a CPU by the one that does all journeys, one after the other.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import lru_cache

import torch

from dsv3_megatron.parallel.exchange import PostAllToAll, Posted, Splits

Between = Callable[[torch.Tensor], torch.Tensor]


def post_hops(rows: torch.Tensor, hops: Sequence[Splits], between: Between, post: PostAllToAll) -> Posted:
    """Start sending rows over one or two groups, one after the other.

    Args:
        rows: [sum(hops[0].sent), ...]; without gradients. Must not change before `wait` has returned.
        hops: Numbers of rows that go to and come from each rank, of each transfer.
        between: Makes the rows of the second transfer of those that came with the first one. The host must not have to
            wait for the device in it.
        post: Starts a transfer.
    """
    if len(hops) == 1:
        return post(rows, hops[0])
    return (_OnStream if rows.is_cuda else _OnThread)(rows, hops, between, post)


class _OnStream:
    def __init__(self, rows: torch.Tensor, hops: Sequence[Splits], between: Between, post: PostAllToAll) -> None:
        self.rows: torch.Tensor | None = rows
        stream = _stream_of(rows.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.posted = post(between(post(rows, hops[0]).wait()), hops[1])

    def wait(self) -> torch.Tensor:
        received = self.posted.wait()
        # Its memory is the other stream's.
        received.record_stream(torch.cuda.current_stream())
        self.rows = None
        return received


@lru_cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class _OnThread:
    def __init__(self, rows: torch.Tensor, hops: Sequence[Splits], between: Between, post: PostAllToAll) -> None:
        self.last: Future[Posted] = Future()

        def journey() -> None:
            with torch.no_grad():
                self.last.set_result(post(between(post(rows, hops[0]).wait()), hops[1]))

        _porter().do(journey, self.last)

    def wait(self) -> torch.Tensor:
        return self.last.result().wait()


class _Porter:
    """A thread that does journeys one after the other; it ends with the process, also in the midst of one."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[tuple[Callable[[], None], Future[Posted]]] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="rows between nodes", daemon=True).start()

    def do(self, journey: Callable[[], None], result: Future[Posted]) -> None:
        """Do a journey behind those before it."""
        self._waiting.put((journey, result))

    def _work(self) -> None:
        while True:
            journey, result = self._waiting.get()
            try:
                journey()
            except BaseException as error:  # noqa: BLE001 - whoever waits for the rows raises it
                result.set_exception(error)
            del journey, result


@lru_cache
def _porter() -> _Porter:
    return _Porter()
