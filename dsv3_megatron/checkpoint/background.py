"""A rank's helper for checkpoints that are written while training goes on: memory, and a process that empties it.

A save copies this rank's tensors to their places in the image of its file (`host_image.py`), which is all that training
waits for. A process beside the rank writes the image to disk, with checksums (`file_copier.py`). The memory takes as
many bytes as this rank's file, from the first save to the end of the run.

The process is started anew as a program of its own, not forked: the rank's threads, its gloo connections and its CUDA
context stay out of it. It imports no torch. No collective runs in it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from dsv3_megatron.checkpoint.host_image import HostImage
from dsv3_megatron.config.output import json_text
from dsv3_megatron.data.checksums import FileChecksums, read_checksums
from dsv3_megatron.process.parent import environment_of_child
from dsv3_megatron.process.stop import STOP_SIGNALS

__all__ = ["BackgroundWriter"]

_COPIER = "dsv3_megatron.checkpoint.file_copier"
_END_S = 10.0


class BackgroundWriter:
    """Memory for the image of one file, the process that copies it to disk, and a thread that waits for it.

    One file at a time: who writes into the memory has waited for the copy of what was there.

    Attributes:
        image: The memory.
        refusal: Why the last save could not be written behind training, as it was said; empty: it could.
    """

    @staticmethod
    def is_possible() -> bool:
        """Whether this system has memory that two processes share by an open file; Linux has."""
        return HostImage.is_possible()

    def __init__(self) -> None:
        self.image = HostImage()
        self.refusal = ""
        self._process: subprocess.Popen[str] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")

    @property
    def pid(self) -> int | None:
        """Process id of the process that writes, once it has been started."""
        return self._process.pid if self._process is not None else None

    def prepare(self, num_bytes: int) -> None:
        """Have the memory for a file, and the process, which starts while the file is put together.

        Args:
            num_bytes: Bytes of the file.

        Raises:
            OSError: this host has not so much memory left, or the process cannot be started.
        """
        self.image.reserve(num_bytes)
        if self._process is None or self._process.poll() is not None:
            self._process = _start_copier(self.image.descriptor)

    def copy(self, path: Path, num_bytes: int) -> FileChecksums:
        """Have the process copy the image to a new file and flush it to disk; to be called in `run`'s thread.

        Raises:
            OSError: the file cannot be written, or the process has ended.
        """
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: so no answer will come
            process.stdin.write(json_text({"path": os.fspath(path), "num_bytes": num_bytes}) + "\n")
            process.stdin.flush()
        line = process.stdout.readline()
        if not line.endswith("\n"):
            raise OSError(f"the process that writes checkpoints has ended with code {process.wait()}")
        answer = json.loads(line)
        if "checksums" in answer:
            return read_checksums(answer["checksums"])
        raise OSError(answer["errno"], answer["reason"], answer["path"])

    def run[T](self, action: Callable[[], T]) -> Future[T]:
        """Run something in this helper's thread, after what it is running already."""
        return self._thread.submit(action)

    def close(self) -> None:
        """End the process and give the memory back; what is being written is not waited for. May be called twice."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait(_END_S)
        self._thread.shutdown(wait=True, cancel_futures=True)
        if process is not None:
            for stream in (process.stdin, process.stdout):
                assert stream is not None
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        self.image.close()


def _start_copier(memory: int) -> subprocess.Popen[str]:
    """Start the process; it looks at no signal that asks to stop: its parent decides."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # a process begins with the signals blocked here
    try:
        return subprocess.Popen([sys.executable, "-m", _COPIER, str(memory), str(os.getpid())],
                                env=environment_of_child(), pass_fds=[memory], text=True,
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
