"""What a full disk, a file size limit of the kernel or a removed folder costs a log: nothing that fits in memory."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsv3_megatron.metrics.kept_file import KeptFile, KeptText

ROOT = Path(__file__).resolve().parents[3]
RECORDS = [f"record {number} {'x' * (number % 7)}\n".encode() for number in range(200)]


class Disk:
    """A disk that has room for so many bytes more; a write that does not fit is short, then refused."""

    def __init__(self) -> None:
        self.room: float = float("inf")
        self.num_calls = 0
        self._write = os.write

    def write(self, descriptor: int, data: bytes) -> int:
        self.num_calls += 1
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self._write(descriptor, data[:int(min(self.room, len(data)))])
        self.room -= written
        return written


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk()
    monkeypatch.setattr("dsv3_megatron.metrics.kept_file.os.write", disk.write)
    monkeypatch.setattr("dsv3_megatron.metrics.kept_file._PATIENCE", 0.0)
    return disk


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    caplog.set_level(logging.WARNING)
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("dsv3_megatron.metrics.kept_file").addHandler(handler)
    yield messages
    logging.getLogger("dsv3_megatron.metrics.kept_file").removeHandler(handler)


@pytest.mark.parametrize("room", [0, 3, 40, 41, 500])
def test_a_full_disk_is_said_once_and_every_record_arrives_whole(tmp_path: Path, disk: Disk, said: list[str], room: int
                                                                ) -> None:
    path = tmp_path / "new folder" / "log"
    file = KeptFile(path, header=b"header\n")
    for number, record in enumerate(RECORDS):
        if number == 20:
            disk.room = room
        if number == 60:
            disk.room = 11  # a little is freed, and is full again at once
        if number == 100:
            disk.room = float("inf")
        file.append(record)
        file.flush()
    file.close()
    assert path.read_bytes() == b"header\n" + b"".join(RECORDS)
    assert len(said) == 2 and "No space left on device; the run goes on" in said[0]
    assert "can be written again: everything that was kept is in it" in said[1]


def test_what_is_kept_is_bounded_and_what_is_lost_is_counted(tmp_path: Path, disk: Disk, said: list[str]) -> None:
    file = KeptFile(tmp_path / "log", limit_bytes=100)
    disk.room = 0
    for number in range(30):
        file.append(f"{number:09d}\n".encode())
        file.flush()
    disk.room = float("inf")
    file.flush()
    assert (tmp_path / "log").read_text().splitlines() == [f"{number:09d}" for number in range(20, 30)]
    assert "all but the oldest 20 records that was kept" in said[1]
    disk.room = 0
    file.append(b"last\n")
    file.close()
    file.close()
    assert said[-1].endswith("could not be written to the end: 1 records are lost")


def test_a_disk_that_takes_long_to_say_no_is_not_asked_at_every_step(tmp_path: Path, disk: Disk,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def slow(*_: object) -> int:
        nonlocal now
        now += 30.0
        disk.num_calls += 1
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("dsv3_megatron.metrics.kept_file._PATIENCE", 10.0)
    monkeypatch.setattr("dsv3_megatron.metrics.kept_file.time.monotonic", lambda: now)
    monkeypatch.setattr("dsv3_megatron.metrics.kept_file.os.write", slow)
    file = KeptFile(tmp_path / "log")
    for _ in range(100):
        now += 1.0
        file.append(b"x\n")
        file.flush()
    assert disk.num_calls == 1, "300 s of patience after 30 s"


def test_a_file_that_is_removed_begins_again_and_a_cut_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "log"
    path.parent.mkdir()
    path.write_bytes(b"whole\ncut sho")
    file = KeptFile(path, header=b"header\n", has_lines=True)
    file.append(b"first\n")
    file.flush()
    assert path.read_bytes() == b"whole\nfirst\n"
    shutil.rmtree(path.parent)
    file.append(b"second\n")
    file.close()
    assert path.read_bytes() == b"header\nsecond\n"


def test_a_small_file_is_replaced_as_a_whole_or_later(tmp_path: Path, said: list[str]) -> None:
    (tmp_path / "logs").write_text("a file in the folder's place")
    text = KeptText(tmp_path / "logs" / "config.json")
    text.write("{}\n")
    text.flush()
    (tmp_path / "logs").unlink()
    text.flush()
    assert (tmp_path / "logs" / "config.json").read_text() == "{}\n"
    assert len(said) == 2 and [path.name for path in (tmp_path / "logs").iterdir()] == ["config.json"]


LIMITED_RUN = """
import dataclasses, logging, resource, sys
from pathlib import Path
logging.basicConfig(format="%(message)s")
from dsv3_megatron.config.guards import GuardConfig
from dsv3_megatron.guards.decisions import Guard
from dsv3_megatron.guards.events import Event, EventLog
from dsv3_megatron.metrics import kept_file
from dsv3_megatron.config.presets import preset
from dsv3_megatron.metrics.flops import RunSpeed, flops_per_token
from dsv3_megatron.metrics.run_records import StepReport
from dsv3_megatron.metrics.writer import MetricsWriter
kept_file._PATIENCE = 0.0
folder, limit = Path(sys.argv[1]), int(sys.argv[2])
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
def report(i):
    return StepReport(i, i, i, 5.0 / i, (6.0,), 1.0, 1.0, 1e-3, 4, 0.1, expert_load={1: [i, 2, 3, 4]})
speed = RunSpeed(16, flops_per_token(preset("tiny").model, 16), 1, None)
writer = MetricsWriter(folder, speed, num_layers=4, picture_interval=4)
writer.write_config({"a": 1}, environment={"b": 2})
log = EventLog(str(folder), enabled=True)
for i in range(1, 41):
    if limit and i == 9:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    if limit and i == 30:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    writer.write_step(report(i))
    log.write(Event(i, "spike", "logged", ("r",), (i, i), (), 1.0, 1.0))
    if i % 10 == 0:
        writer.write_validation(i, 2.0)
writer.close(); log.finish(Guard(GuardConfig()), None)
"""


def logged(folder: Path, limit: int) -> tuple[str, dict[str, object]]:
    """What a run says and what its logs hold, under a limit of the kernel for the size of files in its middle."""
    from dsv3_megatron.metrics.event_files import is_complete, read_run

    result = subprocess.run([sys.executable, "-W", "ignore", "-c", LIMITED_RUN, str(folder), str(limit)], cwd=ROOT,
                            capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert all(is_complete(path) for path in folder.glob("events.out.tfevents.*"))
    run = read_run(folder)
    assert run.records is not None
    return result.stderr, {
        "scalars": dict(run.scalars), "images": dict(run.images),
        "steps": run.records.steps, "validations": run.records.validations, "config": run.config,
        "guards": [json.loads(line) for line in (folder / "guards.jsonl").read_text().splitlines()]}


def test_every_log_of_a_run_is_whole_after_files_could_not_grow_for_a_while(tmp_path: Path) -> None:
    """Short writes and refusals of the kernel itself, in event files, pictures, metrics.jsonl and guards.jsonl."""
    _, free = logged(tmp_path / "free", 0)
    said, limited = logged(tmp_path / "limited", 1500)
    assert limited == free
    for name in ("metrics.jsonl", "guards.jsonl", "events.out.tfevents."):
        cannot = [line for line in said.splitlines() if name in line and "cannot be written: File too large" in line]
        again = [line for line in said.splitlines() if name in line and "can be written again" in line]
        assert len(cannot) == len(again) == 1, said
