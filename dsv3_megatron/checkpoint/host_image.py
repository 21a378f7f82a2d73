"""Memory of this host that another process has too, in which a rank puts together the file that the other writes.

It is a file without a name (memfd_create): both processes have it, no folder such as /dev/shm limits it, and it is gone
with them, whatever ends them. It stays from one save to the next, mapped and in use, so that a save pays for a copy of
its bytes and for nothing else.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from dsv3_megatron.process.host_bytes import free_host_bytes
from dsv3_megatron.process.ranks import Processes

__all__ = ["HostImage"]

# Bytes that one thread copies at a time.
_PIECE = 32 << 20


class HostImage:
    """Bytes that grow to the largest file that they were asked for.

    Attributes:
        descriptor: The memory as an open file, for another process; -1 before the first `reserve`.
    """

    @staticmethod
    def is_possible() -> bool:
        """Whether this system has files in memory; Linux has."""
        return hasattr(os, "memfd_create")

    def __init__(self) -> None:
        self.descriptor = -1  # made by the first save: some runs have none
        self._mapped: mmap.mmap | None = None
        self._bytes = torch.empty(0, dtype=torch.uint8)  # the same memory

    def reserve(self, num_bytes: int) -> None:
        """Have memory for a file; what was in the memory before is lost where it grows.

        Raises:
            OSError: this host has not so much memory left.
        """
        if self.descriptor < 0:
            self.descriptor = os.memfd_create("checkpoint")
        missing = num_bytes - self._bytes.numel()
        if missing <= 0:
            return
        # All ranks of this host ask at the same moment.
        needed, available = missing * Processes.from_environment().local_size, free_host_bytes()
        if available is not None and needed > available:
            raise OSError(errno.ENOMEM, f"a copy of the checkpoint takes {needed / 1e9:.2f} GB of this host's memory, "
                                        f"{available / 1e9:.2f} GB are free")
        os.posix_fallocate(self.descriptor, 0, num_bytes)
        self._let_go()
        # Every page is there from now on: none is looked for while a checkpoint is copied.
        self._mapped = mmap.mmap(self.descriptor, num_bytes, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))
        self._bytes = torch.frombuffer(self._mapped, dtype=torch.uint8)
        if torch.cuda.is_available():
            # Pinned, so that a GPU copies into it by itself. Not run on a GPU yet.
            code = int(torch.cuda.cudart().cudaHostRegister(self._bytes.data_ptr(), num_bytes, 0))
            if code:
                raise OSError(errno.ENOMEM, f"{num_bytes / 1e9:.2f} GB of this host's memory cannot be pinned for a "
                                            f"copy of the checkpoint: CUDA's error {code}")

    def put(self, offset: int, content: bytes | memoryview) -> None:
        """Copy bytes to a place."""
        if content:
            assert self._mapped is not None
            self._mapped[offset:offset + len(content)] = content

    def put_tensors(self, placed: Iterable[tuple[int, torch.Tensor]]) -> None:
        """Copy the values of tensors to their places, and wait for it; they may change afterwards.

        Args:
            placed: Offset in bytes, and tensor, on any device.
        """
        moves: list[tuple[int, int, int]] = []
        runs: list[torch.Tensor] = []  # kept until they are copied
        is_on_gpu = False
        for offset, tensor in placed:
            for values in _runs(tensor.detach()):
                place = self._bytes[offset:offset + values.numel()]
                offset += values.numel()
                if values.is_cuda:
                    place.copy_(values, non_blocking=True)
                    is_on_gpu = True
                    continue
                runs.append(values)
                moves += [(place.data_ptr() + start, values.data_ptr() + start, min(_PIECE, values.numel() - start))
                          for start in range(0, values.numel(), _PIECE)]
        # The C library's copy passes by the caches where much is copied; torch's does not.
        num_threads = torch.get_num_threads()
        with ThreadPoolExecutor(max_workers=num_threads) as pool:
            for done in [pool.submit(_move, moves[thread::num_threads]) for thread in range(num_threads)]:
                done.result()
        if is_on_gpu:
            torch.cuda.current_stream().synchronize()

    def close(self) -> None:
        """Give the memory back. May be called twice."""
        self._let_go()
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def _let_go(self) -> None:
        if self._bytes.numel() and torch.cuda.is_available():
            torch.cuda.cudart().cudaHostUnregister(self._bytes.data_ptr())
        self._bytes, self._mapped = torch.empty(0, dtype=torch.uint8), None


def _move(moves: list[tuple[int, int, int]]) -> None:
    """Copy bytes: to an address, from an address, so many."""
    for move in moves:
        ctypes.memmove(*move)


def _runs(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The bytes of a tensor in order; of halves of experts, expert by expert, so that no copy is made on the way."""
    if not tensor.is_contiguous() and tensor[0].is_contiguous():
        for row in tensor:
            yield from _runs(row)
    else:
        yield tensor.contiguous().view(-1).view(torch.uint8)
