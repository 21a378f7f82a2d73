"""Every way to stop examples/pretrain_dsv3.sh: its workers hear of it, and none of them goes on without it."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.unit.test_launcher import Launch, Quickstart, has_ended

STOPS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU,
         signal.SIGALRM]


@pytest.mark.parametrize("number", STOPS)
def test_every_signal_that_asks_to_stop_reaches_the_workers(number: signal.Signals, tmp_path: Path) -> None:
    launch = Launch(tmp_path, worker_ticks=400)
    process = launch.start("--preset", "tiny")
    launch.wait_for("started", 2)
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == 0
    assert launch.read("signals") == f"{number.name[3:]}\n" * 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT])
def test_a_launcher_in_the_background_of_a_script_can_be_interrupted(number: signal.Signals, tmp_path: Path) -> None:
    """A shell starts it with both ignored, which a shell cannot undo for itself."""
    launch = Launch(tmp_path, worker_ticks=400)
    process = launch.start("--preset", "tiny", ignored=(signal.SIGINT, signal.SIGQUIT))
    launch.wait_for("started", 2)
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == 0
    assert launch.read("signals") == f"{number.name[3:]}\n" * 2


@pytest.mark.parametrize("ignored", [(), (signal.SIGINT, signal.SIGQUIT)], ids=["foreground", "background"])
def test_what_commands_print_is_the_launchers_output(ignored: tuple[int, ...], tmp_path: Path) -> None:
    """Also where the launcher had to begin again, which it does while it looks for its environment."""
    process = Quickstart(tmp_path).start(ignored=ignored)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 0, stderr
    assert "printed by -m dsv3_megatron.reports.summary" in stdout


def test_nohup_is_heeded(tmp_path: Path) -> None:
    launch = Launch(tmp_path, worker_ticks=20)
    process = launch.start("--preset", "tiny", ignored=(signal.SIGHUP,))
    launch.wait_for("started", 2)
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=20)
    assert process.returncode == 0 and launch.read("signals") == ""


def test_a_terminal_that_closes_signals_twice_and_the_run_still_saves(tmp_path: Path) -> None:
    launch = Launch(tmp_path, worker_ticks=400, on_signal="sleep 0.5; exit 0")
    process = launch.start("--preset", "tiny")
    launch.wait_for("started", 2)
    process.send_signal(signal.SIGHUP)
    launch.wait_for("signals", 2)
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=20)
    assert process.returncode == 0


def test_workers_end_with_a_launcher_that_is_killed(tmp_path: Path) -> None:
    launch = Launch(tmp_path, worker_ticks=1200)
    process = launch.start("--preset", "tiny")
    launch.wait_for("pids", 2)
    process.kill()  # and not reaped before its workers are looked at
    assert all(has_ended(int(pid)) for pid in launch.read("pids").split())
    assert launch.read("signals") == "TERM\n" * 2
    process.communicate(timeout=20)


def test_a_stage_ends_with_a_launcher_that_is_killed(tmp_path: Path) -> None:
    quickstart = Quickstart(tmp_path, slow_stage="data.corpus")
    process = quickstart.start()
    quickstart.wait_for("slow", 1)
    process.kill()
    assert has_ended(int(quickstart.read("slow")))
    process.communicate(timeout=20)


@pytest.mark.parametrize("number", STOPS)
def test_every_signal_ends_a_stage(number: signal.Signals, tmp_path: Path) -> None:
    quickstart = Quickstart(tmp_path, slow_stage="train_tokenizer.py")
    process = quickstart.start()
    quickstart.wait_for("slow", 1)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=10)
    assert process.returncode == 128 + number
    assert f"stopped by {number.name}; the same command goes on from here" in stderr
    assert has_ended(int(quickstart.read("slow")))
