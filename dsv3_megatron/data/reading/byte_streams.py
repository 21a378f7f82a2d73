"""The bytes of input files: decompression that notices damage, and whole lines from any part of a file."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from typing import IO, Any

from dsv3_megatron.data.reading.file_content import MAGIC_BYTES, compression_of, decompressor, is_parquet
from dsv3_megatron.data.reading.inputs import STDIN, InputFile
from dsv3_megatron.data.reading.json_lines import Reject

READ_BYTES = 1 << 20
_SCAN_BYTES = 1 << 18


class DamagedFile(Exception):
    """Compressed data that ends early or is broken."""

    def reject(self, byte: int) -> Reject:
        """The Reject for a file of which nothing can be read from `byte` on (of what is in it)."""
        return Reject("damaged file", f"{self}, what follows is lost", "fetch or make the file again", byte)


def open_stream(file: InputFile) -> IO[bytes]:
    """The uncompressed bytes of a file, to be read with `read_some`.

    Raises:
        ValueError: a pipe that holds Parquet.
    """
    if file.is_stream:
        stream = sys.stdin.buffer if file.path == STDIN else open(file.path, "rb", buffering=0)
        return _decompressed_stream(file.path, stream)
    if not file.compression:
        return open(file.path, "rb", buffering=0)
    opened: IO[bytes] = decompressor(file.compression).open(file.path, "rb")
    return opened


def _decompressed_stream(path: str, stream: IO[bytes]) -> IO[bytes]:
    """What comes out of a pipe, whose compression only its first bytes can say."""
    head = b""
    while len(head) < MAGIC_BYTES and (chunk := read_some(stream, MAGIC_BYTES - len(head))):
        head += chunk
    if is_parquet(head):
        raise ValueError(f"input {path}: Parquet cannot be read from a pipe; give a file")
    joined = io.BufferedReader(_Rejoined(head, stream), READ_BYTES)
    compression = compression_of(head)
    if not compression:
        return joined
    opened: IO[bytes] = decompressor(compression).open(joined, "rb")
    return opened


class _Rejoined(io.RawIOBase):
    """The first bytes of a stream, and the stream behind them, which is closed with it."""

    def __init__(self, head: bytes, stream: IO[bytes]) -> None:
        super().__init__()
        self._head, self._stream = head, stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data, self._head = self._head[: len(buffer)], self._head[len(buffer) :]
        if not data:
            data = read_some(self._stream, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()


def read_some(stream: IO[bytes], num_bytes: int = READ_BYTES) -> bytes:
    """Up to num_bytes more, as they come (what lies before damage is not lost to it); nothing at the end.

    Raises:
        DamagedFile: the compressed data ends early or is broken.
    """
    try:
        read: Callable[[int], bytes] = getattr(stream, "read1", stream.read)
        return read(num_bytes)
    except EOFError:
        raise DamagedFile("the compressed file is cut short") from None
    except Exception as error:  # each library has a class of its own
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk, not the data
        raise DamagedFile(f"the compressed file is damaged ({error})") from None


def skip_to(stream: IO[bytes], offset: int) -> None:
    """Read and drop the first `offset` bytes of a stream that cannot seek."""
    while offset > 0:
        chunk = read_some(stream, min(offset, READ_BYTES))
        if not chunk:
            return
        offset -= len(chunk)


def line_blocks(
    stream: IO[bytes], start: int, *, block_bytes: int, max_line_bytes: int
) -> Iterator[tuple[int, bytearray, int, Reject | None, bool]]:
    """Whole lines of a stream, in blocks.

    Args:
        stream: Open stream, at its beginning.
        start: Byte at which the first wanted line begins.
        block_bytes: Size to aim at.
        max_line_bytes: A longer line is read but left out.

    Yields:
        (first byte, lines, byte behind them, a Reject for what follows the lines, whether this is the end).
    """
    first, buffer, whole = start, bytearray(), 0  # `whole` bytes of the buffer are whole lines
    try:
        skip_to(stream, start)
        while True:
            chunk = read_some(stream)
            newline = chunk.rfind(b"\n")
            whole = len(buffer) + newline + 1 if newline >= 0 else whole
            buffer += chunk
            if not chunk:
                yield first, buffer, first + len(buffer), None, True
                return
            if len(buffer) < block_bytes:
                continue
            if whole:
                rest = buffer[whole:]
                del buffer[whole:]
                yield first, buffer, first + whole, None, False
                first, buffer, whole = first + whole, rest, 0
            elif len(buffer) > max_line_bytes:
                begin, first = first, first + len(buffer)
                buffer, skipped = _skip_line(stream)
                first += skipped
                yield begin, bytearray(), first, too_long(begin), False
                whole = buffer.rfind(b"\n") + 1
    except DamagedFile as error:
        del buffer[whole:]
        yield first, buffer, first + whole, error.reject(first + whole), True


def _skip_line(stream: IO[bytes]) -> tuple[bytearray, int]:
    """Drop the rest of a line: what was read behind it, and the bytes dropped."""
    skipped = 0
    while chunk := read_some(stream):
        newline = chunk.find(b"\n")
        if newline >= 0:
            return bytearray(chunk[newline + 1 :]), skipped + newline + 1
        skipped += len(chunk)
    return bytearray(), skipped


def too_long(byte: int) -> Reject:
    """The Reject for a line that cannot hold a document of the size allowed."""
    what = "a line too long for a document of max_document_bytes"
    return Reject("document too large", what, "raise --max-document-bytes", byte)


def read_lines(path: str, start: int, stop: int, *, max_line_bytes: int) -> tuple[int, bytearray, Reject | None]:
    """The lines of a file that begin at bytes start..stop - 1, whole.

    Returns:
        Where the first of them begins, their bytes, and a Reject if the last was longer than max_line_bytes (and is
        left out).
    """
    with open(path, "rb", buffering=0) as stream:
        first = 0 if start == 0 else _after_newline(stream, start - 1)
        if first >= stop:
            return first, bytearray(), None
        end = _after_newline(stream, stop - 1)
        data = bytearray(min(end, stop) - first)
        stream.seek(first)
        _fill(stream, memoryview(data), path)
        last = data.rfind(b"\n", 0, len(data) - 1) + 1
        if end - (first + last) > max_line_bytes:
            del data[last:]
            return first, data, too_long(first + last)
        if end > stop:
            known = len(data)
            data.extend(bytes(end - stop))
            with memoryview(data) as view:
                _fill(stream, view[known:], path)
        return first, data, None


def count_lines(path: str, stop: int) -> int:
    """Line breaks before a byte of a file."""
    count = 0
    with open(path, "rb", buffering=0) as stream:
        while stop > 0 and (chunk := stream.read(min(stop, READ_BYTES))):
            count += chunk.count(b"\n")
            stop -= len(chunk)
    return count


def _after_newline(stream: IO[bytes], at: int) -> int:
    """Offset behind the first line break at or after a byte; the file's end without one."""
    stream.seek(at)
    while chunk := stream.read(_SCAN_BYTES):
        newline = chunk.find(b"\n")
        if newline >= 0:
            return at + newline + 1
        at += len(chunk)
    return at


def _fill(stream: Any, view: memoryview, path: str) -> None:
    at = 0
    while at < len(view):
        count = stream.readinto(view[at:])
        if not count:
            raise OSError(f"{path} became shorter while it was read")
        at += count
