"""Runs of bytes in files: proved while they are read, and moved from one file into another without holding them.

A piece at a time is in memory, in the core's cache: its checksum in the file that it comes from and the one in the file
that it goes to are made there. That takes no longer than to have the kernel move the bytes (copy_file_range) did.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from dsv3_megatron.checkpoint.folder import CheckpointError
from dsv3_megatron.data.checksums import BlockVerifier, DamagedFileError
from dsv3_megatron.data.folder_checksums import CHECKSUMS, refusal
from dsv3_megatron.data.hashed_files import HashedFile, ProvedFile

# Files of one reader that are open at a time.
_MOST_FILES = 16


@dataclass(frozen=True)
class ByteRange:
    """`num_bytes` of a file from `offset` on; `verifier` proves them first, where there is one."""

    file: Path
    offset: int
    num_bytes: int
    verifier: BlockVerifier | None = None


class RangeReader:
    """Reads ranges of bytes of any files; what it gave is good when it has ended without an error. For one thread.

    A context manager. A file's blocks are proved by what is read of them, and at the end at the latest.
    """

    def __init__(self) -> None:
        # The newest last; each with the tensor that was read of it last.
        self._files: dict[Path, tuple[ProvedFile, str]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            while kind is None and self._files:
                self._finish(next(iter(self._files)))
        finally:
            for file, _name in self._files.values():
                file.close()

    def read(self, where: ByteRange, view: Any, name: str) -> None:
        """Fill memory with a range of bytes.

        Args:
            where: Place of the bytes.
            view: Memory for as many bytes.
            name: Name of the tensor, for messages.

        Raises:
            CheckpointError: the file cannot be read, ends before, or is damaged.
        """
        with _told(where.file, name):
            self._file(where, name).read_into(where.offset, view)

    def pieces(self, where: ByteRange, name: str) -> Iterator[memoryview]:
        """A range of bytes in pieces, each good until the next is asked for; arguments and errors are `read`'s."""
        with _told(where.file, name):
            yield from self._file(where, name).pieces(where.offset, where.num_bytes)

    def _file(self, where: ByteRange, name: str) -> ProvedFile:
        file, _ = self._files.pop(where.file, (None, ""))
        if file is None:
            if len(self._files) == _MOST_FILES:
                self._finish(next(iter(self._files)))
            file = ProvedFile(where.file, where.verifier)
        self._files[where.file] = file, name
        return file

    def _finish(self, path: Path) -> None:
        file, name = self._files.pop(path)
        with _told(path, name), file:
            pass


def read_byte_ranges(ranges: Sequence[ByteRange], raw: torch.Tensor, name: str) -> None:
    """Fill a tensor of bytes with ranges of bytes, one after the other.

    Args:
        ranges: Places of the bytes, together as many as `raw` has.
        raw: Tensor to fill, uint8, contiguous.
        name: Name of the tensor, for messages.

    Raises:
        CheckpointError: a file cannot be read, ends before, or is damaged.
    """
    view = memoryview(raw.numpy())
    position = 0
    with RangeReader() as reader:
        for where in ranges:
            reader.read(where, view[position: position + where.num_bytes], name)
            position += where.num_bytes
    assert position == len(view), (name, position, len(view))


def copy_byte_ranges(ranges: Sequence[ByteRange], reader: RangeReader, target: HashedFile, offset: int, name: str,
                     report: Callable[[int], None]) -> None:
    """Write ranges of bytes one after the other into a file.

    Args:
        ranges: Places that the bytes come from.
        reader: Reads them; they are good when it has ended.
        target: File to write.
        offset: First byte to write in that file.
        name: Name of the tensor, for messages.
        report: Told the number of bytes after each step; may raise to stop.

    Raises:
        CheckpointError: a file cannot be read, ends before, or is damaged.
        OSError: the target cannot be written.
    """
    for where in ranges:
        for piece in reader.pieces(where, name):
            target.write(offset, piece)
            offset += len(piece)
            report(len(piece))


def write_tensor(target: HashedFile, offset: int, tensor: torch.Tensor) -> None:
    """Write a contiguous tensor's bytes at a position of a file.

    Raises:
        OSError: the file cannot be written.
    """
    target.write(offset, tensor.contiguous().view(-1).view(torch.uint8).numpy())


@contextlib.contextmanager
def _told(file: Path, name: str) -> Iterator[None]:
    """Tell of what goes wrong in reading a tensor's bytes.

    Raises:
        CheckpointError: something did.
    """
    try:
        yield
    except DamagedFileError as error:
        if (file.parent / CHECKSUMS).is_file():  # of a folder in Hugging Face's layout
            raise CheckpointError(f"{name}: {refusal(file, error)}") from error
        raise CheckpointError(f"{name}: {error}; take another checkpoint, or a copy of this one") from error
    except EOFError as error:
        raise CheckpointError(f"{file} ends within tensor {name}: it is truncated; get it again") from error
    except OSError as error:
        raise CheckpointError(f"{file}: tensor {name} cannot be read: {error.strerror}") from error
