"""One process holds a folder; locks of dead processes are recognised, on this machine and on others."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dsv3_megatron.checkpoint.folder import CheckpointError
from dsv3_megatron.guards.lock import RunLock, process_began
from dsv3_megatron.process.elastic import ELASTIC

ROOT = Path(__file__).resolve().parents[3]
HOLD = ("import sys, time; from pathlib import Path; from dsv3_megatron.guards.lock import RunLock\n"
        "lock = RunLock(Path(sys.argv[1]), 'first', 'save=here'); print(lock.take(), flush=True); time.sleep(60)")


def lock(path: Path, run: str = "second", stale_s: float = 1.0) -> RunLock:
    return RunLock(path, run, "save=here", stale_s=stale_s)


def holding(path: Path) -> subprocess.Popen[str]:
    """Another process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], cwd=ROOT, text=True, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "None\n"
    return process


def change(path: Path, **values: object) -> None:
    """Have the lock say something else of its holder."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_second_process_is_told_who_holds_it_and_kill_leaves_a_stale_lock(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    process = holding(path)
    holder = f"run first, process {process.pid} on {os.uname().nodename} since "
    try:
        for attempt in (lock(path).take, lock(path).refuse_if_held):
            with pytest.raises(CheckpointError, match=f"save=here is in use by {holder}.*choose another folder"):
                attempt()
        process.send_signal(signal.SIGSTOP)  # suspended is not gone
        with pytest.raises(CheckpointError, match="in use"):
            lock(path).take()
        lock(path).release()  # another's: it stays
    finally:
        process.kill()
    # It has ended as soon as it is a zombie, before anybody asks for its exit code.
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
        time.sleep(0.01)
    mine = lock(path)
    mine.refuse_if_held()
    note = mine.take()
    process.communicate()
    assert note is not None and note.startswith(f"save=here: the lock of {holder}"), note
    assert note.endswith("is stale (that process is gone): taken over")
    mine.check()
    mine.release()
    assert list(tmp_path.iterdir()) == []


def test_another_process_with_the_same_id_is_not_the_holder(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    process = holding(path)
    change(path, began="1")
    note = lock(path).take()
    process.kill()
    process.communicate()
    assert note is not None and "that process is gone" in note


@pytest.mark.parametrize("is_readable", [True, False])
def test_a_lock_of_another_machine_is_watched(tmp_path: Path, is_readable: bool) -> None:
    """Also a machine of the same name, and a lock that does not say whose it is."""
    path = tmp_path / "run.lock"
    process = holding(path)
    process.kill()
    process.communicate()
    if is_readable:
        change(path, processes=f"{os.uname().nodename} another boot 1")
    else:
        path.write_text("")
    lock(path).refuse_if_held()
    stop = threading.Event()

    def touch() -> None:
        while not stop.wait(0.2):
            os.utime(path)

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        with pytest.raises(CheckpointError, match="in use by (run first, process|a process that it does not name)"):
            lock(path, stale_s=20.0).take()
    finally:
        stop.set()
        thread.join()
    started = time.monotonic()
    note = lock(path, stale_s=1.0).take()
    assert note is not None and "no sign of life for 1 s" in note and time.monotonic() - started >= 1.0


def test_a_lock_nobody_touched_for_hours_is_not_watched(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    path.write_text("")
    os.utime(path, (time.time() - 7200, time.time() - 7200))
    note = lock(path, stale_s=500.0).take()
    assert note is not None and "no sign of life for 7" in note


def test_a_holder_that_was_taken_for_gone_is_told_before_it_writes(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    mine = lock(path, "mine")
    mine.take()
    path.unlink()
    mine.check()  # removed by hand: taken again
    assert path.exists()
    path.unlink()
    process = holding(path)
    before = path.stat().st_mtime_ns
    mine.touch()
    assert path.stat().st_mtime_ns == before, "a sign of life for somebody else"
    with pytest.raises(CheckpointError, match=f"no longer this run's: run first, process {process.pid} .* has taken"):
        mine.check()
    mine.release()
    assert path.exists()
    process.kill()
    process.communicate()


def test_of_many_processes_that_start_at_once_one_gets_the_lock(tmp_path: Path) -> None:
    """Over a stale lock too, and on a file system without hard links."""
    program = ("import sys, os, errno, time; from pathlib import Path; from dsv3_megatron.guards import lock\n"
               "def link(*_): raise OSError(errno.EPERM, 'no links')\n"
               "if sys.argv[2] == 'without links': os.link = link\n"
               "mine = lock.RunLock(Path(sys.argv[1]), 'r', 's', stale_s=1.0)\n"
               "try: mine.take()\nexcept lock.CheckpointError: print('held')\nelse: print('taken', flush=True)\n"
               "sys.stdin.read()")
    for number, kind in enumerate(("with links", "without links", "stale")):
        path = tmp_path / f"{number}.lock"
        if kind == "stale":
            process = holding(path)
            process.kill()
            process.communicate()
        started = [subprocess.Popen([sys.executable, "-c", program, str(path), kind], cwd=ROOT, text=True,
                                    stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(4)]
        answers = [process.stdout.readline().strip() for process in started if process.stdout]
        for process in started:
            process.communicate("")
        assert sorted(answers) == ["held", "held", "held", "taken"], kind


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        lock(tmp_path / "run.lock").take()
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_start_of_the_same_launch_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not refused: it ends by itself; of another launch it is refused."""
    monkeypatch.setenv(ELASTIC, "run at here:1")
    path = tmp_path / "run.lock"
    process = holding(path)
    mine = lock(path)
    mine.refuse_if_held()
    threading.Timer(1.0, process.kill).start()
    threading.Timer(1.1, process.wait).start()
    assert "is stale (that process is gone): taken over" in str(mine.take())
    monkeypatch.setenv(ELASTIC, "another at here:1")
    change(path, pid=os.getppid(), began=process_began(os.getppid()), launch="run at here:1")
    for attempt in (lock(path).take, lock(path).refuse_if_held):
        with pytest.raises(CheckpointError, match="in use"):
            attempt()


def test_a_lost_host_of_the_same_launch_is_taken_for_gone_sooner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                                 ) -> None:
    monkeypatch.setenv(ELASTIC, "run at here:1")
    monkeypatch.setattr("dsv3_megatron.guards.lock.BEAT_S", 0.2)
    path = tmp_path / "run.lock"
    lock(path).take()
    change(path, processes="another host", token="theirs")
    assert "no sign of life for 0.6 s" in str(lock(path, stale_s=120.0).take())
