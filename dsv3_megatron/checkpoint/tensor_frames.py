"""What torch.save puts around the bytes of a tensor: it depends on dtype and shape, and not on a value.

With it, the file of a save can be laid out before a tensor is looked at, and a save is a copy of bytes.

There is one exception. torch's writer makes an id of the checksums that it sees go by. It takes every piece that begins
with the bytes 50 4B 07 08 for one of them, a tensor too. Such a tensor has another id where torch writes it; a frame
has that of all others. Nobody reads the id.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, cast

import torch

_crc32_lock = threading.RLock()
# Elements that cover the bytes in which torch's writer looks for a checksum.
_NUM_READ = 8

__all__ = ["TensorFrame", "frame_of", "known_frame", "without_crc32"]


@dataclass(frozen=True)
class TensorFrame:
    """An entry of a file: the bytes before those of the tensor, and the bytes behind them.

    Attributes:
        head: Bytes before the tensor's.
        num_bytes: Bytes of the tensor.
        tail: Bytes behind the tensor's.
    """

    head: bytes
    num_bytes: int
    tail: bytes

    @property
    def length(self) -> int:
        """Bytes of the entry."""
        return len(self.head) + self.num_bytes + len(self.tail)


@functools.lru_cache(maxsize=4096)
def frame_of(dtype: torch.dtype, shape: tuple[int, ...]) -> TensorFrame:
    """The frame of a contiguous tensor on the host that has its storage for itself.

    Raises:
        RuntimeError: this version of torch writes a tensor in another way than in one piece.
    """
    # Never read, but for its beginning: the kernel has not given the rest of its memory yet.
    tensor = torch.empty(shape, dtype=dtype, device="cpu")
    tensor.view(-1)[:_NUM_READ].zero_()
    recorder = _Recorder(tensor.data_ptr(), tensor.numel() * tensor.element_size())
    with without_crc32():
        torch.save(tensor, cast(IO[bytes], recorder))
    if not recorder.num_bytes:
        return TensorFrame(b"".join(recorder.parts[0]), 0, b"")
    if len(recorder.parts) != 2:
        raise RuntimeError(f"torch.save has written {dtype} of shape {shape} in {len(recorder.parts) - 1} pieces: "
                           "checkpoints of this version of torch cannot be written behind training (--no-async-save)")
    head, tail = (b"".join(part) for part in recorder.parts)
    return TensorFrame(head, recorder.num_bytes, tail)


def known_frame(dtype: torch.dtype, shape: tuple[int, ...], length: int, read: Callable[[int], bytes]
                ) -> TensorFrame | None:
    """The frame of an entry that was written as this version of torch writes it; its values lie between head and tail.

    A head that is the same byte for byte is proved by that.

    Args:
        dtype: Dtype of the tensor.
        shape: Shape of the tensor.
        length: Bytes of the entry.
        read: Gives so many bytes from the entry's beginning, or fewer where there are not so many.

    Returns:
        The frame; None: the entry is of another version of torch, of another writer, or damaged.
    """
    try:
        frame = frame_of(dtype, shape)
    except RuntimeError:
        return None
    return frame if length == frame.length and read(len(frame.head)) == frame.head else None


class _Recorder:
    """A file that keeps what is written to it, but for the bytes of one tensor.

    Attributes:
        parts: What came before the tensor's bytes, and behind them.
    """

    def __init__(self, address: int, num_bytes: int) -> None:
        self._address, self.num_bytes = address, num_bytes
        self.parts: list[list[bytes]] = [[]]

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if self.num_bytes and len(view) == self.num_bytes and _address_of(view) == self._address:
            self.parts.append([])
        else:
            self.parts[-1].append(bytes(view))
        return len(view)

    def flush(self) -> None:
        """Nothing: there is no file."""


def _address_of(view: memoryview) -> int:
    # The bytes may be read-only, which torch warns of; numpy does not.
    import numpy as np

    return int(np.frombuffer(view, dtype=np.uint8).__array_interface__["data"][0])


@contextmanager
def without_crc32() -> Iterator[None]:
    """Have torch.save leave its own checksum out (CRC-32).

    It takes several times as long as those of the manifest, and no reader of torch's looks at it.
    """
    with _crc32_lock:  # the option is the process's
        before = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)
        try:
            yield
        finally:
            torch.serialization.set_crc32_options(before)
