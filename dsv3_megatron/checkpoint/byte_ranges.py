"""Runs of bytes in files, and moving them from one file into another without holding them.

A tensor that keeps its dtype is moved by the kernel from file to file; only what has to be computed with comes into
memory.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dsv3_megatron.checkpoint.folder import CheckpointError
from dsv3_megatron.data.checksums import BlockVerifier, DamagedFileError
from dsv3_megatron.data.folder_checksums import CHECKSUMS, refusal

# Bytes moved between two looks at whether the conversion was stopped, and read at a time where the kernel cannot.
_STEP_BYTES = 64_000_000
_BUFFER_BYTES = 8_000_000
_NOT_BY_KERNEL = frozenset({errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.ETXTBSY})


@dataclass(frozen=True)
class ByteRange:
    """`num_bytes` of a file from `offset` on; `verifier` proves them first, where there is one."""

    file: Path
    offset: int
    num_bytes: int
    verifier: BlockVerifier | None = None


def read_byte_ranges(ranges: Sequence[ByteRange], raw: torch.Tensor, name: str) -> None:
    """Fill a tensor of bytes with ranges of bytes, one after the other.

    Args:
        ranges: Places of the bytes, together as many as `raw` has.
        raw: Tensor to fill, uint8, contiguous.
        name: Name of the tensor, for messages.

    Raises:
        CheckpointError: a file cannot be read or ends before.
    """
    view = memoryview(raw.numpy())
    position = 0
    for where in ranges:
        part = view[position: position + where.num_bytes]
        position += where.num_bytes
        _prove(where, name)
        try:
            descriptor = os.open(where.file, os.O_RDONLY)
            try:
                done = 0
                while done < len(part):
                    count = os.preadv(descriptor, [part[done:]], where.offset + done)
                    if not count:
                        raise _cut(where, name)
                    done += count
            finally:
                os.close(descriptor)
        except OSError as error:
            raise _unreadable(where, name, error) from error
    assert position == len(view), (name, position, len(view))


def _prove(where: ByteRange, name: str) -> None:
    if where.verifier is None:
        return
    try:
        where.verifier.require(where.offset, where.num_bytes)
    except DamagedFileError as error:
        if (where.file.parent / CHECKSUMS).is_file():  # of a folder in Hugging Face's layout
            raise CheckpointError(f"{name}: {refusal(where.file, error)}") from error
        raise CheckpointError(f"{name}: {error}; take another checkpoint, or a copy of this one") from error
    except OSError as error:
        raise _unreadable(where, name, error) from error


def copy_byte_ranges(ranges: Sequence[ByteRange], target: int, offset: int, name: str,
                     report: Callable[[int], None]) -> None:
    """Write ranges of bytes one after the other into an open file.

    Args:
        ranges: Places that the bytes come from.
        target: Descriptor of the file to write.
        offset: First byte to write in that file.
        name: Name of the tensor, for messages.
        report: Told the number of bytes after each step; may raise to stop.

    Raises:
        CheckpointError: a file cannot be read or ends before.
        OSError: the target cannot be written.
    """
    for where in ranges:
        _prove(where, name)
        try:
            source = os.open(where.file, os.O_RDONLY)
        except OSError as error:
            raise _unreadable(where, name, error) from error
        try:
            done = 0
            while done < where.num_bytes:
                step = min(_STEP_BYTES, where.num_bytes - done)
                count = _copy(source, where.offset + done, target, offset + done, step)
                if not count:
                    raise _cut(where, name)
                done += count
                report(count)
        finally:
            os.close(source)
        offset += where.num_bytes


def write_tensor(target: int, offset: int, tensor: torch.Tensor) -> None:
    """Write a contiguous tensor's bytes at a position of an open file.

    Raises:
        OSError: the file cannot be written.
    """
    view = memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    done = 0
    while done < len(view):
        done += os.pwrite(target, view[done: done + _STEP_BYTES], offset + done)


def _copy(source: int, start: int, target: int, offset: int, num_bytes: int) -> int:
    """Move some bytes, by the kernel where it can; how many, 0 at the source's end."""
    try:
        return os.copy_file_range(source, target, num_bytes, start, offset)
    except OSError as error:
        if error.errno not in _NOT_BY_KERNEL:
            raise
    data = os.pread(source, min(num_bytes, _BUFFER_BYTES), start)
    done = 0
    while done < len(data):
        done += os.pwrite(target, data[done:], offset + done)
    return len(data)


def _cut(where: ByteRange, name: str) -> CheckpointError:
    return CheckpointError(f"{where.file} ends within tensor {name}: it is truncated; get it again")


def _unreadable(where: ByteRange, name: str, error: OSError) -> CheckpointError:
    return CheckpointError(f"{where.file}: tensor {name} cannot be read: {error.strerror}")
