"""Checksums of files by block: made while a file is written, compared before its bytes are used. No torch.

Datasets and checkpoints share this module. A file is cut into blocks of 4 MiB, and each block has a checksum of its
own. So damage is found with its offset, and a reader that needs a part of a file proves that part alone.

The checksum is XXH3 (64 bits, package xxhash). An environment that was made before xxhash was among the dependencies
writes CRC-32 of the standard library instead, at about a sixth of the speed. What is written names its algorithm.
Both find every single flipped bit. Neither keeps out somebody who writes a file and its checksum anew.
"""

from __future__ import annotations

import errno
import importlib
import math
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, Any

from dsv3_megatron.config.packages import is_installed

_XXHASH: Any = importlib.import_module("xxhash") if is_installed("xxhash") else None

BLOCK_BYTES = 4 << 20
# Bytes read at a time and hashed behind: they are in a core's own cache still, which takes a quarter of the time that
# hashing takes from memory.
PIECE_BYTES = 512 << 10
_SMALLEST_BLOCK, _LARGEST_BLOCK = 4 << 10, 1 << 30
_memory = threading.local()


class _Crc32:
    """CRC-32 with the interface of a hash object."""

    def __init__(self) -> None:
        self._value = 0

    def update(self, data: Any) -> None:
        self._value = zlib.crc32(data, self._value)

    def intdigest(self) -> int:
        return self._value


_MAKERS: dict[str, Any] = {"crc32": _Crc32} | ({"xxh3_64": _XXHASH.xxh3_64} if _XXHASH else {})
_DIGITS = {"crc32": 8, "xxh3_64": 16}
ALGORITHM = "xxh3_64" if _XXHASH else "crc32"


class DamagedFileError(ValueError):
    """A file whose bytes are not those that were written; the message names it and the offset.

    Attributes:
        path: The file.
        offset: First byte of the block that is damaged.
    """

    def __init__(self, path: str, offset: int, reason: str) -> None:
        super().__init__(f"{path} is damaged: {reason}")
        self.path, self.offset = path, offset


@dataclass(frozen=True)
class FileChecksums:
    """The checksums of one file.

    Attributes:
        algorithm: "xxh3_64" or "crc32".
        block_bytes: Bytes of a block; the last one may be shorter.
        num_bytes: Bytes of the file.
        digits: Hexadecimal digits of all blocks' checksums, one after the other.
    """

    algorithm: str
    block_bytes: int
    num_bytes: int
    digits: str

    @property
    def num_blocks(self) -> int:
        """Number of blocks; 0 for an empty file."""
        return math.ceil(self.num_bytes / self.block_bytes)

    def of_block(self, block: int) -> str:
        """Hexadecimal checksum of a block."""
        width = _DIGITS[self.algorithm]
        return self.digits[block * width: (block + 1) * width]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, for `read_checksums`."""
        return {"algorithm": self.algorithm, "block_bytes": self.block_bytes, "num_bytes": self.num_bytes,
                "blocks": self.digits}


def read_checksums(content: Mapping[str, Any]) -> FileChecksums:
    """What `FileChecksums.as_dict` gave, checked.

    Raises:
        ValueError: a value is missing or cannot be, or the algorithm needs a package that is not installed.
    """
    algorithm, block_bytes, num_bytes, digits = (
        content.get(name) for name in ("algorithm", "block_bytes", "num_bytes", "blocks"))
    if algorithm not in _DIGITS:
        raise ValueError(f"checksums by {algorithm!r} are unknown; known are {', '.join(sorted(_DIGITS))}")
    if algorithm not in _MAKERS:
        raise ValueError(f"checksums by {algorithm} need the package xxhash: pip install xxhash")
    if type(block_bytes) is not int or type(num_bytes) is not int or num_bytes < 0 \
            or not _SMALLEST_BLOCK <= block_bytes <= _LARGEST_BLOCK:
        raise ValueError(f"checksums with block_bytes={block_bytes!r} and num_bytes={num_bytes!r} cannot be")
    found = FileChecksums(algorithm, block_bytes, num_bytes, digits if isinstance(digits, str) else "")
    if len(found.digits) != found.num_blocks * _DIGITS[algorithm]:
        raise ValueError(f"{len(found.digits)} digits of checksums for {found.num_blocks} blocks, where a block has "
                         f"{_DIGITS[algorithm]}")
    return found


def is_known(algorithm: str) -> bool:
    """Whether checksums by this algorithm can be made here."""
    return algorithm in _MAKERS


def num_digits(algorithm: str) -> int:
    """Hexadecimal digits of one checksum."""
    return _DIGITS[algorithm]


def checksum_of(data: Any, algorithm: str = ALGORITHM) -> str:
    """Hexadecimal checksum of some bytes."""
    made = new_checksum(algorithm)
    made.update(data)
    return digits_of(made, algorithm)


class RunningChecksum:
    """Makes one checksum of all bytes that come one after the other.

    Args:
        algorithm: "xxh3_64" or "crc32".
    """

    def __init__(self, algorithm: str = ALGORITHM) -> None:
        self.algorithm, self._made = algorithm, new_checksum(algorithm)

    def update(self, data: Any) -> None:
        """Take in the next bytes."""
        self._made.update(data)

    def text(self) -> str:
        """The checksum of what was taken in so far, with its algorithm: "ALGORITHM:DIGITS"."""
        return f"{self.algorithm}:{digits_of(self._made, self.algorithm)}"


class BlockHasher:
    """Makes the checksums of bytes that come one after the other, in pieces of any size.

    Args:
        algorithm: "xxh3_64" or "crc32".
        block_bytes: Bytes of a block.
    """

    def __init__(self, algorithm: str = ALGORITHM, block_bytes: int = BLOCK_BYTES) -> None:
        self._algorithm, self._block_bytes = algorithm, block_bytes
        self._done: list[str] = []
        self._num_bytes = 0
        self._block = new_checksum(algorithm)

    def update(self, data: Any) -> None:
        """Take in the next bytes."""
        view = memoryview(data).cast("B")
        while len(view):
            room = self._block_bytes - self._num_bytes % self._block_bytes
            part, view = view[:room], view[room:]
            self._block.update(part)
            self._num_bytes += len(part)
            if self._num_bytes % self._block_bytes == 0:
                self._done.append(self._digits())
                self._block = new_checksum(self._algorithm)

    def result(self) -> FileChecksums:
        """The checksums of all bytes so far; more may follow."""
        last = [self._digits()] if self._num_bytes % self._block_bytes else []
        return FileChecksums(self._algorithm, self._block_bytes, self._num_bytes, "".join([*self._done, *last]))

    def _digits(self) -> str:
        return digits_of(self._block, self._algorithm)


class ChecksumStream:
    """A file opened for writing that makes the checksums of what goes through it.

    Args:
        stream: File opened for binary writing, at its beginning; with a buffer, so that it writes all of what it is
            given or raises.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._hasher, self._position = stream, BlockHasher(), 0

    def write(self, data: Any) -> int:
        """Write all of some bytes and take in their checksum.

        Raises:
            OSError: the file cannot be written.
        """
        self._hasher.update(data)
        count = memoryview(data).nbytes
        if self._stream.write(data) != count:
            raise OSError(errno.EIO, "a part of what was to be written was not")
        self._position += count
        return count

    def tell(self) -> int:
        """Bytes written so far."""
        return self._position

    def flush(self) -> None:
        """Hand what was written to the operating system."""
        self._stream.flush()

    def fileno(self) -> int:
        """The descriptor of the file."""
        return self._stream.fileno()

    def checksums(self) -> FileChecksums:
        """The checksums of what was written so far."""
        return self._hasher.result()


def checksum_file(path: str | os.PathLike[str]) -> FileChecksums:
    """Read a whole file and make its checksums.

    Raises:
        OSError: the file cannot be read.
    """
    hasher = BlockHasher()
    buffer = piece_buffer()
    with open(path, "rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            hasher.update(buffer[:count])
    return hasher.result()


class BlockVerifier:
    """Proves the blocks of a file, each once, before what is in them is used. Used by several threads.

    Args:
        path: The file.
        checksums: Checksums that its blocks had when they were written.
    """

    def __init__(self, path: str | os.PathLike[str], checksums: FileChecksums) -> None:
        self.path, self.checksums = os.fspath(path), checksums
        self._is_proved = bytearray(checksums.num_blocks)

    def blocks(self, offset: int, num_bytes: int) -> range:
        """The blocks that hold a run of bytes."""
        size = self.checksums.block_bytes
        if num_bytes <= 0:
            return range(0)
        first, stop = offset // size, min(self.checksums.num_blocks, -(-(offset + num_bytes) // size))
        return range(first, stop)

    def require(self, offset: int, num_bytes: int) -> None:
        """Prove the blocks that hold a run of bytes.

        Raises:
            DamagedFileError: a block does not have its checksum, or the file ends before.
            OSError: the file cannot be read.
        """
        for block in self.blocks(offset, num_bytes):
            self.require_block(block)

    def require_block(self, block: int) -> None:
        """Prove one block; errors are those of `require`."""
        if self.is_proved(block):
            return
        start, stop = self.bounds(block)
        made = new_checksum(self.checksums.algorithm)
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            while start < stop:
                part = piece_buffer()[:stop - start]
                count = read_at(descriptor, part, start)
                made.update(part[:count])
                start += count
                if count < len(part):
                    raise self.cut(start)
        finally:
            os.close(descriptor)
        self.settle(block, made)

    def is_proved(self, block: int) -> bool:
        """Whether a block has been proved already."""
        return bool(self._is_proved[block])

    def bounds(self, block: int) -> tuple[int, int]:
        """First byte of a block, and the first behind it."""
        start = block * self.checksums.block_bytes
        return start, min(self.checksums.num_bytes, start + self.checksums.block_bytes)

    def settle(self, block: int, made: Any) -> None:
        """Compare a block's checksum with that of the bytes that were read.

        Args:
            block: Number of the block.
            made: Hash object from `new_checksum`, which has taken in the whole block.

        Raises:
            DamagedFileError: the two checksums differ.
        """
        known = self.checksums
        if digits_of(made, known.algorithm) != known.of_block(block):
            start, stop = self.bounds(block)
            raise DamagedFileError(self.path, start, f"the {stop - start} bytes from offset {start} on do not have "
                                                     f"their checksum ({known.algorithm})")
        self._is_proved[block] = 1

    def cut(self, end: int) -> DamagedFileError:
        """The error of a file that ends at byte `end`, before it should."""
        known = self.checksums
        return DamagedFileError(self.path, end // known.block_bytes * known.block_bytes,
                                f"it ends at byte {end}, {known.num_bytes} were written")


def prove_file(path: str | os.PathLike[str], checksums: FileChecksums) -> None:
    """Read a whole file, and compare its size and every block with its checksums.

    Raises:
        DamagedFileError: the file has another size, or a block does not have its checksum.
        OSError: the file cannot be read.
    """
    size = os.path.getsize(path)
    if size != checksums.num_bytes:
        raise DamagedFileError(os.fspath(path), min(size, checksums.num_bytes),
                               f"it has {size} bytes, {checksums.num_bytes} were written")
    BlockVerifier(path, checksums).require(0, size)


def new_checksum(algorithm: str = ALGORITHM) -> Any:
    """A hash object with `update` and `intdigest`, for bytes that come one after the other."""
    return _MAKERS[algorithm]()


def digits_of(made: Any, algorithm: str = ALGORITHM) -> str:
    """Hexadecimal digits of what a hash object from `new_checksum` has taken in."""
    return f"{made.intdigest():0{_DIGITS[algorithm]}x}"


def read_at(descriptor: int, view: memoryview, offset: int) -> int:
    """Fill memory from a position of an open file on; how many bytes there were, fewer at the file's end alone."""
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if not count:
            break
        done += count
    return done


def piece_buffer() -> memoryview:
    """Memory of this thread to read a piece into, whatever file it is of."""
    known: memoryview | None = getattr(_memory, "buffer", None)
    if known is None:
        known = _memory.buffer = memoryview(bytearray(PIECE_BYTES))
    return known


def damages(verifiers: Mapping[str, BlockVerifier], num_threads: int, report: Callable[[int], None] | None = None
            ) -> Iterator[tuple[str, DamagedFileError]]:
    """Every damaged block of some files, each read in whole; by name, in the order of the files.

    Args:
        verifiers: The files by names of the caller's.
        num_threads: Blocks read at a time.
        report: Called with the number of bytes when a block has been looked at.

    Raises:
        OSError: a file cannot be read.
    """
    def look(verifier: BlockVerifier, block: int) -> DamagedFileError | None:
        try:
            verifier.require_block(block)
        except DamagedFileError as error:
            return error
        return None

    with ThreadPoolExecutor(max_workers=max(1, num_threads)) as pool:
        for name, verifier in verifiers.items():
            blocks = range(verifier.checksums.num_blocks)
            for block, error in zip(blocks, pool.map(look, [verifier] * len(blocks), blocks), strict=True):
                if report is not None:
                    start, stop = verifier.bounds(block)
                    report(stop - start)
                if error is not None:
                    yield name, error
            size = os.path.getsize(verifier.path)
            if size > verifier.checksums.num_bytes:
                yield name, DamagedFileError(verifier.path, verifier.checksums.num_bytes, f"it has {size} bytes, "
                                             f"{verifier.checksums.num_bytes} were written")
