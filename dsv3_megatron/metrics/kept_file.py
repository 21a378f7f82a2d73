"""A file that is only added to, whose disk may be full, read-only or gone for a while: its writer goes on. No torch.

What cannot be written is kept in memory and written when it can be, in order and whole: of a record that reached the
disk in part, the part is cut off first. It is said once when writing fails, and once when it works again. What is kept
is bounded: beyond that the oldest records are lost, and counted.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from pathlib import Path

from dsv3_megatron.config.new_files import replace_text

LIMIT_BYTES = 64_000_000
# Records are written together up to this size.
_CHUNK_BYTES = 1_000_000
# An attempt that fails is not repeated before so many times what it took: a dead network disk takes long to say no.
_PATIENCE = 10.0

logger = logging.getLogger(__name__)


class KeptFile:
    """A file of records that a run appends to.

    Args:
        path: The file; made, with its folder, when the first record is written, and again if it is removed.
        header: Bytes that a new file begins with.
        has_lines: Records are lines; what follows the last whole one, of a crash, is cut off when the file is opened.
        limit_bytes: Bytes of the records that are kept.
    """

    def __init__(self, path: Path, *, header: bytes = b"", has_lines: bool = False, limit_bytes: int = LIMIT_BYTES
                 ) -> None:
        self.path = path
        self._header, self._has_lines, self._limit_bytes = header, has_lines, limit_bytes
        self._kept: deque[bytes] = deque()
        self._kept_bytes = self._num_lost = 0
        self._descriptor: int | None = None
        # Of the file: bytes of whole records; more than these may be there after a failure.
        self._whole_bytes = 0
        self._is_cut_due = False
        self._failure: OSError | None = None
        self._next_try = 0.0

    def append(self, record: bytes) -> None:
        """Keep a record until the next `flush`."""
        self._kept.append(record)
        self._kept_bytes += len(record)
        while self._kept_bytes > self._limit_bytes and len(self._kept) > 1:
            self._kept_bytes -= len(self._kept.popleft())
            self._num_lost += 1

    def flush(self, *, is_last: bool = False) -> None:
        """Write what is kept, if it can be; raises nothing.

        Args:
            is_last: There will be no other attempt.
        """
        started = time.monotonic()
        if not self._kept or (started < self._next_try and not is_last):
            return
        try:
            self._write()
        except OSError as error:
            now = time.monotonic()
            self._next_try = now + _PATIENCE * (now - started)
            if self._failure is None:
                logger.warning("%s cannot be written: %s; the run goes on, what belongs there is kept (up to %d MB) "
                               "and tried again", self.path, error.strerror or error, self._limit_bytes // 1_000_000)
            self._failure = error
        else:
            if self._failure is not None:
                lost = f"all but the oldest {self._num_lost} records" if self._num_lost else "everything"
                logger.warning("%s can be written again: %s that was kept is in it", self.path, lost)
                self._failure, self._num_lost = None, 0

    def close(self) -> None:
        """Write what is kept and let the file go; what cannot be written is lost, and counted. May be called twice."""
        self.flush(is_last=True)
        if self._kept:
            logger.warning("%s could not be written to the end: %d records are lost", self.path,
                           len(self._kept) + self._num_lost)
            self._kept.clear()
            self._kept_bytes = 0
        self._release()

    # ---- parts ---------------------------------------------------------------------------------------

    def _write(self) -> None:
        """Write what is kept.

        Raises:
            OSError: not all of it could be; what was is no longer kept.
        """
        descriptor = self._open()
        if self._is_cut_due:
            os.ftruncate(descriptor, self._whole_bytes)
            self._is_cut_due = False
        while self._kept:
            size = number = 0
            while number < len(self._kept) and (not number or size < _CHUNK_BYTES):
                size += len(self._kept[number])
                number += 1
            data = b"".join([self._kept[index] for index in range(number)])
            self._put(descriptor, data if self._whole_bytes else self._header + data)
            for _ in range(number):
                self._kept_bytes -= len(self._kept.popleft())

    def _put(self, descriptor: int, data: bytes) -> None:
        written = 0
        try:
            while written < len(data):
                written += os.write(descriptor, data[written:])
        finally:
            if written == len(data):
                self._whole_bytes += written
            elif written:
                self._is_cut_due = True

    def _open(self) -> int:
        """The open file; opened again where another file, or none, has its name."""
        if self._descriptor is not None:
            mine = os.fstat(self._descriptor)
            try:
                there = os.stat(self.path)
            except FileNotFoundError:
                there = None
            if there is not None and (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino):
                return self._descriptor
            self._release()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._descriptor = descriptor
        self._whole_bytes = os.fstat(descriptor).st_size
        self._is_cut_due = False
        if self._has_lines and self._whole_bytes:
            whole = os.pread(descriptor, self._whole_bytes, 0).rfind(b"\n") + 1
            self._is_cut_due, self._whole_bytes = whole < self._whole_bytes, whole
        return descriptor

    def _release(self) -> None:
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            try:
                os.close(descriptor)
            except OSError as error:  # a network file system may say only now that something was not written
                logger.warning("%s: the end of it may be missing: %s", self.path, error.strerror)


class KeptText:
    """A small file that is written as a whole, later if it cannot be now.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._text: str | None = None
        self._has_failed = False

    def write(self, text: str) -> None:
        """Replace the file's content; raises nothing."""
        self._text = text
        self.flush()

    def flush(self) -> None:
        """Try again what could not be written; raises nothing."""
        if self._text is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(self.path, self._text)
        except OSError as error:
            if not self._has_failed:
                logger.warning("%s cannot be written: %s; the run goes on, and it is tried again", self.path,
                               error.strerror or error)
            self._has_failed = True
            return
        if self._has_failed:
            logger.warning("%s is written now", self.path)
        self._text, self._has_failed = None, False
