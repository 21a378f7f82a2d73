"""The process that empties a rank's memory onto disk: what it copies, what it says, when it ends."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsv3_megatron.checkpoint import host_image as module
from dsv3_megatron.checkpoint.background import BackgroundWriter
from dsv3_megatron.data.checksums import BLOCK_BYTES, FileChecksums, checksum_file


@pytest.fixture
def writer() -> Iterator[BackgroundWriter]:
    made = BackgroundWriter()
    yield made
    made.close()


def copied(writer: BackgroundWriter, content: bytes, path: Path) -> FileChecksums:
    writer.prepare(len(content))
    writer.image.put(0, content)
    return writer.run(lambda: writer.copy(path, len(content))).result(timeout=30)


def test_files_are_copied_whole_one_after_the_other_by_one_process(writer: BackgroundWriter, tmp_path: Path) -> None:
    assert writer.pid is None
    pids = set()
    # A shorter one leaves bytes of the one before in the memory, which are no part of it.
    for number, size in enumerate((2 * BLOCK_BYTES + 5, 3, 0, BLOCK_BYTES)):
        content = bytes([number + 1]) * size
        checksums = copied(writer, content, tmp_path / str(number))
        assert (tmp_path / str(number)).read_bytes() == content and checksums == checksum_file(tmp_path / str(number))
        pids.add(writer.pid)
    assert len(pids) == 1


def test_what_goes_wrong_is_an_error_of_the_file(writer: BackgroundWriter, tmp_path: Path) -> None:
    (tmp_path / "there").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="there"):
        copied(writer, b"other", tmp_path / "there")
    assert (tmp_path / "there").read_bytes() == b"mine"
    with pytest.raises(FileNotFoundError, match="nowhere"):
        copied(writer, b"a", tmp_path / "nowhere" / "a")
    if Path("/dev/full").exists():
        writer.prepare(0)
        # As a disk without room: the name is another file system's, where a new file cannot be made either.
        with pytest.raises(OSError, match="/dev/full") as error:
            copied(writer, b"a", Path("/dev/full"))
        assert error.value.errno in (errno.EEXIST, errno.ENOSPC)
    assert copied(writer, b"sound", tmp_path / "sound").num_bytes == 5


def test_a_process_that_is_ended_is_started_anew(writer: BackgroundWriter, tmp_path: Path) -> None:
    copied(writer, b"first", tmp_path / "first")
    before = writer.pid
    assert before is not None
    os.kill(before, signal.SIGSTOP)
    result = writer.run(lambda: writer.copy(tmp_path / "lost", 5))
    os.kill(before, signal.SIGKILL)
    with pytest.raises(OSError, match="has ended with code -9"):
        result.result(timeout=30)
    assert copied(writer, b"again", tmp_path / "again").num_bytes == 5 and writer.pid != before


def test_signals_that_ask_a_run_to_stop_are_not_for_the_process(writer: BackgroundWriter, tmp_path: Path) -> None:
    writer.prepare(0)
    assert writer.pid is not None
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        os.kill(writer.pid, number)  # from its start on, before it has read a line of Python
    before = writer.pid
    assert copied(writer, b"sound", tmp_path / "sound").num_bytes == 5 and writer.pid == before


def test_a_host_without_the_memory_is_refused(writer: BackgroundWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "free_host_bytes", lambda: 10_000)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    writer.prepare(2500)
    with pytest.raises(OSError, match=r"takes 0\.00 GB of this host's memory"):
        writer.prepare(5001)  # 2501 more, four times
    monkeypatch.setattr(module, "free_host_bytes", lambda: None)
    writer.prepare(5001)


PARENT = """
import os, signal, sys
from dsv3_megatron.checkpoint.background import BackgroundWriter
writer = BackgroundWriter()
writer.prepare(5)
print(writer.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_process_ends_with_a_parent_that_is_killed() -> None:
    parent = subprocess.run([sys.executable, "-c", PARENT], capture_output=True, text=True, timeout=60)
    assert parent.returncode == -signal.SIGKILL, parent.stderr
    process = Path("/proc") / parent.stdout.strip()
    deadline = time.monotonic() + 20
    while is_running(process) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_running(process)


def is_running(process: Path) -> bool:
    try:
        return "\nState:\tZ" not in (process / "status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_closing_gives_everything_back(tmp_path: Path) -> None:
    writer = BackgroundWriter()
    copied(writer, b"a", tmp_path / "a")
    pid = writer.pid
    descriptors = len(os.listdir("/proc/self/fd"))
    writer.close()
    writer.close()
    assert not is_running(Path(f"/proc/{pid}"))
    assert len(os.listdir("/proc/self/fd")) == descriptors - 4  # the memory, its map, and two pipes


@pytest.mark.parametrize("room", [0, 1, BLOCK_BYTES, BLOCK_BYTES + 7])
def test_a_file_that_cannot_grow_is_an_error_wherever_the_room_ends(writer: BackgroundWriter, tmp_path: Path, room: int
                                                                    ) -> None:
    """The kernel writes a part first, and says so by a count alone."""
    writer.prepare(0)
    assert writer.pid is not None
    resource.prlimit(writer.pid, resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    with pytest.raises(OSError, match="File too large"):
        copied(writer, bytes(2 * BLOCK_BYTES), tmp_path / "cut")
    resource.prlimit(writer.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert copied(writer, bytes(2 * BLOCK_BYTES), tmp_path / "whole").num_bytes == 2 * BLOCK_BYTES
