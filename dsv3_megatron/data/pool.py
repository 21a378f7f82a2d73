"""Worker processes that turn items into results, in the items' order, and never outlive their work.

Workers are forked, so that they share what the parent has loaded. A worker that dies, by the system's hand for want of
memory say, ends the work with its exit status; a parent that dies takes its workers with it. Large bytes travel beside
items and results, as they are: pickled, they would be copied several times.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

from dsv3_megatron.process.parent import end_with_parent
from dsv3_megatron.process.stop import reset_in_child

Payload = bytes | bytearray | None
Function = Callable[[Any, Payload], tuple[Any, list[bytes]]]


class WorkerDied(RuntimeError):
    """A worker ended without being told to. `item` is what it was working on."""

    def __init__(self, pid: int, exit_code: int | None, item: Any) -> None:
        if exit_code is not None and exit_code < 0:
            name = signal.Signals(-exit_code).name
            how = f"was killed by {name}" + (" (was memory short?)" if name == "SIGKILL" else "")
        else:
            how = f"ended with exit code {exit_code}"
        super().__init__(f"worker process {pid} {how}")
        self.item = item


class WorkerError(RuntimeError):
    """An exception inside a worker, with its traceback as text."""


class _Worker:
    def __init__(self, function: Function, others: list[Connection]) -> None:
        self.connection, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("fork")
        inherited = [self.connection, *others]
        self.process = context.Process(target=_serve, args=(function, theirs, inherited, os.getpid()), daemon=True)
        self.process.start()
        theirs.close()
        self.index = -1
        self.item: Any = None


def _serve(
    function: Function, connection: Connection, inherited: list[Connection], parent: int
) -> None:
    """A worker's life: an item in, a result out, until there is nothing left or no parent."""
    for other in inherited:  # else the end of the parent would not be seen here
        other.close()
    reset_in_child()  # Ctrl-C reaches the whole group: the parent decides
    end_with_parent(parent)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            item, has_payload = connection.recv()
            payload = connection.recv_bytes() if has_payload else None
            try:
                header, buffers = function(item, payload)
            except Exception:  # noqa: BLE001 - raised again in the parent
                connection.send((None, traceback.format_exc(), 0))
                continue
            connection.send((header, None, len(buffers)))
            while buffers:
                connection.send_bytes(buffers.pop(0))
    os._exit(0)  # what the parent left in its buffers is the parent's to write


class WorkerPool:
    """A context manager that owns the workers; they are gone when it is left, whatever happened.

    Args:
        function: Run in the workers: (item, payload) -> (result, buffers).
        num_workers: Number of processes to start.
    """

    def __init__(self, function: Function, num_workers: int) -> None:
        self._workers: list[_Worker] = []
        self._stop = threading.Event()
        try:
            for _ in range(num_workers):
                self._workers.append(_Worker(function, [worker.connection for worker in self._workers]))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the workers, at once if they are busy."""
        self._stop.set()
        for worker in self._workers:
            worker.process.kill()
            worker.connection.close()
        for worker in self._workers:
            worker.process.join()
        self._workers = []

    def map_ordered(self, items: Iterable[tuple[Any, Payload]]) -> Iterator[tuple[Any, Any, list[bytes]]]:
        """Yield (item, result, buffers) in the items' order, from (item, payload) pairs.

        Items are taken from their iterable in a thread of its own, a few ahead; so many results wait at the most for an
        earlier one that is not ready.

        Raises:
            WorkerDied: a worker ended.
            WorkerError: the function raised.
        """
        depth = 2 * len(self._workers) + 2
        source = _Feeder(items, len(self._workers) + 1, self._stop)
        ready: dict[int, tuple[Any, Any, list[bytes]]] = {}
        idle = list(self._workers)
        given = taken = 0
        is_exhausted = False
        while not is_exhausted or taken < given:
            while idle and not is_exhausted and given - taken < depth and source.has_items():
                try:
                    item, payload = source.get()
                except StopIteration:
                    is_exhausted = True
                    break
                worker = idle.pop()
                worker.index, worker.item = given, item
                given += 1
                try:
                    worker.connection.send((item, payload is not None))
                    if payload is not None:
                        worker.connection.send_bytes(payload)
                except (BrokenPipeError, ConnectionResetError):
                    raise self._died(worker) from None
            while taken in ready:
                yield ready.pop(taken)
                taken += 1
            busy = {worker.connection: worker for worker in self._workers if worker.index >= 0}
            can_give = idle and not is_exhausted and given - taken < depth
            if not busy and not can_give:
                continue
            for connection in wait([*busy, source.signal] if can_give else [*busy]):
                if connection is source.signal:
                    continue
                worker = busy[connection]  # type: ignore[index]
                ready[worker.index] = (worker.item, *self._receive(worker))
                worker.index, worker.item = -1, None
                idle.append(worker)

    def _receive(self, worker: _Worker) -> tuple[Any, list[bytes]]:
        try:
            header, error, num_buffers = worker.connection.recv()
            buffers = [worker.connection.recv_bytes() for _ in range(num_buffers)]
        except (EOFError, ConnectionResetError):
            raise self._died(worker) from None
        if error is not None:
            raise WorkerError(f"in a worker process:\n{error}")
        return header, buffers

    def _died(self, worker: _Worker) -> WorkerDied:
        worker.process.join(5)
        return WorkerDied(worker.process.pid or 0, worker.process.exitcode, worker.item)


class _Feeder:
    """Runs an iterable in a thread; `signal` can be waited for and is ready while `has_items`."""

    def __init__(self, items: Iterable[Any], size: int, stop: threading.Event) -> None:
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue(size)
        self.signal, self._bell = multiprocessing.Pipe(duplex=False)
        self._stop = stop
        self._items = items
        threading.Thread(target=self._run, daemon=True, name="feeder").start()

    def _run(self) -> None:
        try:
            for item in self._items:
                if not self._put(("item", item)):
                    return
            self._put(("end", None))
        except BaseException as error:  # noqa: BLE001 - raised again where the items are used
            self._put(("error", error))

    def _put(self, entry: tuple[str, Any]) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(entry, timeout=0.2)
            except queue.Full:
                continue
            with contextlib.suppress(OSError):  # the receiving end is gone
                self._bell.send_bytes(b".")
            return True
        return False

    def has_items(self) -> bool:
        return self.signal.poll()

    def get(self) -> Any:
        """The next item; StopIteration at the end."""
        self.signal.recv_bytes()
        kind, value = self._queue.get()
        if kind == "error":
            raise value
        if kind == "end":
            raise StopIteration
        return value
