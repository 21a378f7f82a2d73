"""What a process of an elastic run is told, and tells."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsv3_megatron.commands import train
from dsv3_megatron.guards.endings import EXIT_CODE_FILE, tell_launcher
from dsv3_megatron.process.elastic import (
    ELASTIC,
    EXIT_AGAIN,
    STOP_FILE,
    STOPPED_CODE,
    elastic_launch,
    end_agent,
    is_told_to_stop,
    stopped_code,
)
from dsv3_megatron.process.ranks import Processes

ROOT = Path(__file__).resolve().parents[3]


def test_nothing_without_the_launcher(monkeypatch) -> None:
    monkeypatch.delenv(ELASTIC, raising=False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert elastic_launch() is None
    end_agent()  # this test's parent lives on


def test_the_stop_file_is_looked_for_when_asked(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv(STOP_FILE, str(tmp_path / "stop"))
    assert not is_told_to_stop()
    (tmp_path / "stop").touch()
    assert is_told_to_stop()


def test_a_stopped_run_ends_with_0_unless_it_is_started_again_otherwise(monkeypatch, tmp_path) -> None:
    for name in (ELASTIC, STOPPED_CODE):
        monkeypatch.delenv(name, raising=False)
    assert stopped_code() == 0
    for given, code in (("75", 75), ("0", 0), ("many", 0), ("300", 0)):
        monkeypatch.setenv(STOPPED_CODE, given)
        assert stopped_code() == code
    monkeypatch.setenv(ELASTIC, "run at here:1")
    monkeypatch.setenv(STOP_FILE, str(tmp_path / "stop"))
    assert stopped_code() == EXIT_AGAIN  # torchrun signalled it, to start it again
    (tmp_path / "stop").touch()
    assert stopped_code() == 0


def test_only_what_the_next_start_would_meet_again_is_told(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv(ELASTIC, "run at here:1")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv(EXIT_CODE_FILE, str(tmp_path / "code"))
    assert [tell_launcher(code) for code in (4, 143)] == [4, 143] and not (tmp_path / "code").exists()
    assert tell_launcher(3) == 3 and (tmp_path / "code").read_text() == "3\n"


def test_torchrun_is_ended_with_a_process_that_would_fail_again(tmp_path) -> None:
    child = (f"import os; os.environ.update({ELASTIC}='x', TORCHELASTIC_RUN_ID='y')\n"
             "from dsv3_megatron.process.elastic import end_agent\nend_agent()")
    parent = f"import subprocess, sys, time; subprocess.run([sys.executable, '-c', {child!r}]); time.sleep(60)"
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", parent], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGTERM and time.monotonic() - started < 30


@pytest.mark.parametrize("launch", ["x", ""])
def test_an_orphan_of_an_elastic_run_ends_at_once(launch: str, tmp_path: Path) -> None:
    """One of another run asks to stop, and has half a minute."""
    orphan = ("import os, time\nfrom dsv3_megatron.process.stop import StopListener, stop_calls\n"
              f"def asked(number):\n    open({str(tmp_path / 'asked')!r}, 'w').close()\n"
              "with StopListener('nothing'), stop_calls(asked):\n"
              "    print(os.getpid(), flush=True)\n    time.sleep(30)")
    parent = (f"import subprocess, sys, time\nchild = subprocess.Popen([sys.executable, '-c', {orphan!r}])\n"
              "time.sleep(60)")
    environment = dict(os.environ, TORCHELASTIC_RUN_ID="y") | ({ELASTIC: launch} if launch else {})
    with subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT, env=environment, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.kill()
        deadline = time.monotonic() + 10
        while Path(f"/proc/{pid}").exists() and not (tmp_path / "asked").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert (tmp_path / "asked").exists() == (not launch)
        if not launch:
            os.kill(pid, signal.SIGKILL)


def test_starts_of_an_elastic_run_meet_under_one_name_whatever_agents_count() -> None:
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "TORCHELASTIC_RUN_ID": "run"}
    own = [Processes.from_environment(place | {"TORCHELASTIC_RESTART_COUNT": count}).attempt for count in ("0", "3")]
    assert own == ["0", "0"]
    shared = place | {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "3"}
    assert Processes.from_environment(shared).attempt == "run/3"


def test_processes_that_are_too_many_are_left_out(monkeypatch, capsys) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "6"), ("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "6"),
                        ("MASTER_ADDR", "here")):
        monkeypatch.setenv(name, value)
    found = train._narrowed(Processes.from_environment(), 4)
    assert (found.rank, found.world_size, found.local_size) == (1, 4, 4) and capsys.readouterr().err == ""
    assert train._narrowed(found, 4) is found
    monkeypatch.setenv("RANK", "0")
    train._narrowed(Processes.from_environment(), 2)
    assert "2 of 4 processes are used" in capsys.readouterr().err and os.environ["WORLD_SIZE"] == "2"
