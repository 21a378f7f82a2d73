"""A conversion under way: files written in parallel under another name, resumed after a stop, published at once.

    OUTPUT.partial/
        conversion.json     what is being converted to what; the same command goes on, another is refused
        lock                held by the process that converts
        finished/NAME.json  a file of the result that is complete: its checksums, and what its writer has to say of it
        result/             renamed to OUTPUT when all of it is there

A file is written under another name, flushed to disk and renamed; so a file with its final name is complete. Its
checksums are made of the bytes as they are written; whoever goes on compares them.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import torch

from dsv3_megatron.checkpoint.folder import CheckpointError, check_empty, flush
from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.json_files import read_json_object
from dsv3_megatron.config.new_files import replace_text, require_own_folder
from dsv3_megatron.config.output import json_text
from dsv3_megatron.data.checksums import FileChecksums, prove_file, read_checksums
from dsv3_megatron.data.hashed_files import HashedFile
from dsv3_megatron.data.signed_json import with_signature, without_signature

# Told a number of bytes that have been written or read; called from any thread.
Report = Callable[[int], None]
_WRITING = ".writing"
_SIGNATURE = "signature"
# Disk space beyond the tensors themselves: headers, index.
_OVERHEAD = 1.01


@dataclass(frozen=True)
class OutputFile:
    """A file of the result, and how to write it.

    Attributes:
        name: Path of the file below the result.
        num_bytes: About how long it will be.
        write: Writes it, telling the bytes it has written; returns what to remember of it, plain values. Runs in a
            thread of its own.
    """

    name: str
    num_bytes: int
    write: Callable[[HashedFile, Report], Any]


class ProgressDisplay(Protocol):
    """Shows how far a conversion is."""

    def start(self, what: str, num_bytes: int) -> Report:
        """A part of the work begins; the result is told how many of its bytes are done."""


def ignore(_num_bytes: int) -> None:
    """The Report that nobody reads."""


@contextmanager
def single_threaded_workers(num_workers: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """Threads that compute by themselves: torch would otherwise start more of them for each.

    Args:
        num_workers: How many; at least one is started.
        name: Prefix of the threads' names.
    """
    num_threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(max(1, num_workers), thread_name_prefix=name, initializer=torch.set_num_threads,
                                initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(num_threads)  # threads started from now on ask for the process's last setting


class Workplace:
    """The folder in which a conversion is made.

    Args:
        output: The final folder; must not exist or be empty.
        identity: What is converted to what, plain values: a stopped conversion goes on if it is the same.
    """

    def __init__(self, output: str | Path, identity: dict[str, Any]) -> None:
        self.output = Path(os.path.abspath(output))
        self.identity = identity
        self.root = self.output.with_name(self.output.name + ".partial")
        self.result = self.root / "result"
        self._finished = self.root / "finished"
        self._lock: IO[str] | None = None

    def open(self, num_bytes: int) -> None:
        """Start or go on with the conversion.

        Args:
            num_bytes: Bytes of the whole result, to compare with the free disk space.

        Raises:
            CheckpointError: the output is not empty, another conversion is or was under way, or the disk is too small.
        """
        check_empty(self.output)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            require_own_folder(self.root)
            self._finished.mkdir(exist_ok=True)
            self.result.mkdir(exist_ok=True)
            self._take_lock()
            self._check_identity()
            self._check_space(num_bytes)
        except ConfigError:
            self.close()
            raise
        except OSError as error:
            self.close()
            raise CheckpointError(f"{self.root}: {error.strerror} ({error.filename})") from error

    def run(self, pieces: Sequence[OutputFile], *, num_workers: int, report: Report) -> None:
        """Write those pieces that are not finished, in parallel.

        Args:
            pieces: Files of the result; several processes may each run a part of them.
            num_workers: Threads that write, each a file at a time.
            report: Told the bytes written, from any thread; and at once those of pieces that were finished before.

        Raises:
            CheckpointError: one could not be written, or what was finished before is damaged; what is finished stays,
                and the same command goes on from it.
        """
        stop = threading.Event()

        def careful(count: int) -> None:
            if stop.is_set():
                raise _StoppedError
            report(count)

        todo = []
        for piece in pieces:
            if self._record(piece).is_file() and (self.result / piece.name).is_file():
                self._require_whole(piece)
                report(piece.num_bytes)
            else:
                todo.append(piece)
        with single_threaded_workers(num_workers, "convert") as pool:
            futures = [pool.submit(self._write, piece, careful) for piece in todo]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                # An error of one, or Ctrl-C: the others stop at their next step.
                stop.set()
                for future in futures:
                    future.cancel()
        errors = [error for future in futures if not future.cancelled() and (error := future.exception())]
        real = [error for error in errors if not isinstance(error, _StoppedError)]
        if real:
            raise real[0]
        assert not errors, "stopped without an error"

    def told(self, piece: OutputFile) -> Any:
        """Read what a finished piece's writer returned.

        Raises:
            CheckpointError: the record of it is damaged.
        """
        return self._read_record(piece)["told"]

    def checksums(self, pieces: Sequence[OutputFile]) -> dict[str, FileChecksums]:
        """The checksums of finished pieces, by the names of their files.

        Raises:
            CheckpointError: the record of one is damaged.
        """
        return {piece.name: read_checksums(self._read_record(piece)["checksums"]) for piece in pieces}

    def is_finished(self, pieces: Sequence[OutputFile]) -> bool:
        """Whether all of the given pieces are complete."""
        return all(self._record(piece).is_file() for piece in pieces)

    def publish(self) -> Path:
        """Give the result its final name, and remove the rest.

        Raises:
            CheckpointError: something has appeared under that name meanwhile.
        """
        check_empty(self.output)
        try:
            if self.output.is_dir():
                self.output.rmdir()
            os.rename(self.result, self.output)
        except OSError as error:
            raise CheckpointError(
                f"{self.output}: {error.strerror}; the complete result is in {self.result}") from error
        flush(self.output.parent)
        self.close()
        shutil.rmtree(self.root)
        return self.output

    def close(self) -> None:
        """Let another process go on; what is finished stays."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    # ---- parts ---------------------------------------------------------------------------------------

    def _write(self, piece: OutputFile, report: Report) -> None:
        final = self.result / piece.name
        partial = final.with_name(final.name + _WRITING)
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            with HashedFile(partial) as target:
                told = piece.write(target, report)
                target.flush()
                content = {"told": told, "checksums": target.checksums().as_dict()}
            os.rename(partial, final)
            record = self._record(piece)
            record.parent.mkdir(parents=True, exist_ok=True)
            replace_text(record, json_text(with_signature(content, _SIGNATURE)), is_durable=True)
        except OSError as error:
            way_out = ("free some space and give the same command again: it goes on from what is finished"
                       if error.errno in (errno.ENOSPC, errno.EDQUOT) else "the same command goes on from what is "
                       "finished")
            raise CheckpointError(f"{final} could not be written: {error.strerror}; {way_out}") from error

    def _record(self, piece: OutputFile) -> Path:
        return self._finished / f"{piece.name}.json"

    def _read_record(self, piece: OutputFile) -> dict[str, Any]:
        try:
            return without_signature(read_json_object(self._record(piece)), _SIGNATURE)
        except ValueError as error:
            raise CheckpointError(f"{self._record(piece)} cannot be gone on from ({error}): remove it, and the file is "
                                  "written again") from error

    def _require_whole(self, piece: OutputFile) -> None:
        """Prove a file that an earlier process finished."""
        file, known = self.result / piece.name, self.checksums([piece])[piece.name]
        try:
            prove_file(file, known)
        except ValueError as error:
            raise CheckpointError(f"{error}; remove {self._record(piece)}, and the file is written again") from error

    def _take_lock(self) -> None:
        lock = open(self.root / "lock", "w", encoding="utf-8")  # held until close()
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise CheckpointError(f"{self.root} is being written by another process; wait for it, or choose another "
                                  "output") from error
        self._lock = lock

    def _check_identity(self) -> None:
        file = self.root / "conversion.json"
        if not file.exists():
            replace_text(file, json_text(self.identity, indent=2, sort_keys=True))
            return
        try:
            known = read_json_object(file)
        except ValueError as error:
            raise CheckpointError(f"{file} does not say what is being converted ({error}): remove {self.root}, and the "
                                  "conversion starts over") from error
        mine = json.loads(json_text(self.identity))
        differing = sorted(key for key in known.keys() | mine.keys() if known.get(key) != mine.get(key))
        if differing:
            details = "; ".join(f"{key} was {_short(known.get(key))}, is {_short(mine.get(key))}" for key in differing)
            raise CheckpointError(f"{self.root} holds another conversion that was not finished ({details}); remove it, "
                                  "or choose another output")

    def _check_space(self, num_bytes: int) -> None:
        have = sum(file.stat().st_blocks * 512 for file in self.result.rglob("*") if file.is_file())
        needed, free = int(num_bytes * _OVERHEAD) - have, shutil.disk_usage(self.root).free
        if free < needed:
            raise CheckpointError(f"{self.output} needs {needed / 1e9:.2f} GB more, {free / 1e9:.2f} GB are free "
                                  "there; free some, or choose another output")


class _StoppedError(Exception):
    """Ends a thread because another one failed."""


def _short(value: Any) -> str:
    text = json_text(value)
    return text if len(text) <= 80 else text[:77] + "..."
