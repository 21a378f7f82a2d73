"""`dsv3 sweep`: whole sweeps of a stand-in for a run, stopped and killed and gone on with, and their table.

A sweep of a real run is in tests/distributed/test_sweep.py.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dsv3_megatron.commands.sweep import main
from dsv3_megatron.reports.sweep_table import DONE
from dsv3_megatron.runs import run_queue
from tests.stub_run import SAVE_INTERVAL, loss

ROOT = Path(__file__).resolve().parents[3]
# `dsv3 sweep` in a process of its own, whose runs are the stand-in.
PROGRAM = ("import sys\nfrom dsv3_megatron.runs import run_queue\n"
           "run_queue.PROGRAM = (sys.executable, '-m', 'tests.stub_run')\n"
           "from dsv3_megatron.commands.dispatch import run_named\nsys.argv[0] = 'dsv3'\nrun_named('sweep')\n")
STEPS = 40
Sweep = Callable[..., "Done"]
NAMES = ("lr=0.001", "lr=0.01")
SEEDS = (1, 2, 3)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "study.toml"
    path.write_text(f'output = "{tmp_path}/study"\nseeds = [1, 2, 3]\nat_a_time = 2\n[settings]\n'
                    f"train_iters = {STEPS}\nlr_warmup_iters = 0\n[grid]\nlr = [0.001, 0.01]\n")
    return path


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def sweep(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """The command in this process, whose runs are the stand-in."""
    def do(file: Path, *flags: str, **variables: str) -> Done:
        with monkeypatch.context() as patch:
            patch.setattr(run_queue, "PROGRAM", (sys.executable, "-m", "tests.stub_run"))
            patch.setattr(run_queue, "_TICK_S", 0.02)
            for name, value in variables.items():
                patch.setenv(name, value)
            code = main([str(file), *flags])
        printed = capsys.readouterr()
        return Done(code, printed.out, printed.err)

    return do


@contextlib.contextmanager
def begun(file: Path, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """A sweep under way, whose first runs have passed a checkpoint."""
    own = {**os.environ, "PYTHONPATH": str(ROOT)} | variables
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(file)], stderr=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True, env=own)
    try:
        deadline = time.monotonic() + 200
        while len(list(file.parent.glob("study/*/*/checkpoints/step"))) < 3:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.02)
        yield process
    finally:
        process.kill()
        process.wait()


def starts(file: Path) -> dict[str, list[tuple[int, int]]]:
    """(process, first step) of every start of each run."""
    return {f"{path.parent.parent.name}/{path.parent.name}": [
        (int(line.split()[0]), int(line.split()[1])) for line in path.read_text().splitlines()]
        for path in sorted(file.parent.glob("study/*/*/starts.log"))}


def rows(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((file.parent / "study" / "results.csv").read_text().splitlines()))


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def require_whole(file: Path) -> None:
    """The sweep is that which nothing broke off: every run, each step once, the right numbers."""
    found = rows(file)
    assert [(row["setting"], int(row["seed"])) for row in found] == [(name, seed) for seed in SEEDS for name in NAMES]
    for row in found:
        lr, seed = float(row["lr"]), int(row["seed"])
        assert (row["state"], int(row["steps"])) == (DONE, STEPS)
        lines = (Path(row["folder"]) / "tensorboard" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["iteration"] for line in lines] == list(range(1, STEPS + 1))
        last = sum(loss(lr, seed, step) for step in range(STEPS - 9, STEPS + 1)) / 10
        assert float(row["lm_loss, last"]) == pytest.approx(last, rel=1e-5)


def test_a_sweep_does_every_run_once_and_prints_its_table(sweep: Sweep, file: Path) -> None:
    done = sweep(file)
    assert done.returncode == 0, done.stderr
    require_whole(file)
    assert all([step for _, step in each] == [0] for each in starts(file).values()) and len(starts(file)) == 6
    lines = done.stdout.splitlines()
    assert [line.split("|")[1:3] for line in lines[2:4]] == [[f" {name} ", " 3 of 3 "] for name in NAMES]
    assert "± 0.0100" in lines[2], "the seeds are 0.01 apart"
    ended = r"^\[1/6\] lr=0\.0+1, seed 1: done after 0:0\d:\d\d, lm_loss \d\.\d{4}$"
    assert re.search(ended, done.stderr, re.MULTILINE)
    assert "[6/6]" in done.stderr and "6 runs, 0 of them finished before" in done.stderr
    again = sweep(file)
    assert again.returncode == 0 and again.stdout == done.stdout
    assert "6 of them finished before" in again.stderr and all(len(each) == 1 for each in starts(file).values())


@pytest.mark.parametrize("saves", ["0", "1"], ids=["runs killed too", "runs save at its end"])
def test_a_sweep_that_is_killed_goes_on_with_the_same_command(sweep: Sweep, file: Path, saves: str) -> None:
    with begun(file, STUB_STEP_S="0.02", STUB_SAVES_AT_STOP=saves) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        deadline = time.monotonic() + 100
        while any(is_there(each[-1][0]) for each in starts(file).values()):
            assert time.monotonic() < deadline, "a run outlives the sweep that was killed"
            time.sleep(0.05)
    before = starts(file)
    study = file.parent / "study"
    saved = {name: int(step.read_text()) if (step := study / name / "checkpoints" / "step").exists() else 0
             for name in before}
    assert len(before) < 6 and any(0 < step < STEPS for step in saved.values()), "killed when it shows nothing"
    done = sweep(file)
    assert done.returncode == 0, done.stderr
    require_whole(file)
    for name, each in starts(file).items():
        steps = [step for _, step in each]
        if saved.get(name) == STEPS:  # with its last checkpoint on disk it is as good as done, noted or not
            assert steps in ([0], [0, STEPS])
        else:
            assert steps == ([0, saved[name]] if name in before else [0])
    assert saves == "1" or all(step % SAVE_INTERVAL == 0 for step in saved.values())


def test_a_sweep_that_is_stopped_has_its_runs_save_and_says_so(sweep: Sweep, file: Path) -> None:
    with begun(file, STUB_STEP_S="0.02", STUB_SAVES_AT_STOP="1") as process:
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=100)
    assert process.returncode == 128 + signal.SIGTERM
    assert told.splitlines()[-1] == "stopped by SIGTERM: the same command goes on"
    assert not any(is_there(each[-1][0]) for each in starts(file).values())
    table = sweep(file, "--table")
    assert table.returncode == 0 and "not finished" in table.stdout or "stopped" in table.stdout, table
    assert sweep(file).returncode == 0
    require_whole(file)


def test_a_run_that_fails_is_told_and_tried_again_and_the_others_are_done(sweep: Sweep, file: Path) -> None:
    done = sweep(file, STUB_WRONG="0.01:1")
    assert done.returncode == 1
    assert "lr=0.01, seed 1: failed with code 1" in done.stderr
    assert "  error: the stand-in was told to go wrong" in done.stderr
    assert "| lr=0.001 | 3 of 3 |" in done.stdout and "| lr=0.01 | 0 of 3 |" in done.stdout
    assert "lr=0.01, seed 2: failed with code 1, 1 steps" in done.stdout
    assert sweep(file).returncode == 0
    require_whole(file)


def test_a_run_that_a_guard_ended_is_not_begun_again(sweep: Sweep, file: Path) -> None:
    assert sweep(file, STUB_WRONG="0.01:3").returncode == 1
    done = sweep(file)
    assert done.returncode == 1 and "lr=0.01, seed 1: ended by a guard, 1 steps" in done.stdout
    assert "6 runs, 6 of them finished before" in done.stderr
    assert all(len(each) == 1 for each in starts(file).values())


def test_an_input_that_is_wrong_ends_the_sweep(sweep: Sweep, file: Path) -> None:
    done = sweep(file, "--at-a-time", "1", STUB_WRONG="0.001:2")
    assert done.returncode == 2
    assert "a setting or an input is wrong, which the other runs would meet too" in done.stderr
    assert len(starts(file)) == 1


def test_a_changed_file_does_new_runs_and_refuses_others_in_a_folder_that_is_taken(sweep: Sweep, file: Path) -> None:
    assert sweep(file).returncode == 0
    text = file.read_text()
    file.write_text(text.replace("[1, 2, 3]", "[1, 2, 3, 4]"))
    done = sweep(file)
    assert done.returncode == 0 and "8 runs, 6 of them finished before" in done.stderr
    file.write_text(text.replace(f"train_iters = {STEPS}", "train_iters = 50"))
    done = sweep(file)
    assert done.returncode == 2
    assert (f"error: {file.parent}/study/lr=0.001/seed-1 holds a run with other settings (40, now 50): give the sweep "
            "another output, or remove that folder") in done.stderr


def test_two_sweeps_in_one_folder(sweep: Sweep, file: Path) -> None:
    with begun(file, STUB_STEP_S="0.05"):
        done = sweep(file)
        assert done.returncode == 2 and f"error: output={file.parent}/study is in use by run sweep" in done.stderr


def test_a_folder_with_other_things_is_refused(sweep: Sweep, file: Path) -> None:
    (file.parent / "study").mkdir()
    (file.parent / "study" / "thesis.tex").write_text("")
    done = sweep(file)
    assert done.returncode == 2 and "holds other things than a sweep's; give a folder of its own" in done.stderr
    assert [path.name for path in (file.parent / "study").iterdir()] == ["thesis.tex"]


def test_the_commands_can_be_looked_at_and_nothing_is_written(sweep: Sweep, file: Path) -> None:
    done = sweep(file, "--list")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 6
    assert done.stdout.splitlines()[1] == (
        f"dsv3 train --train-iters {STEPS} --lr-warmup-iters 0 --lr 0.01 --seed 1 --save "
        f"{file.parent}/study/lr=0.01/seed-1/checkpoints --tensorboard-dir "
        f"{file.parent}/study/lr=0.01/seed-1/tensorboard --resume auto")
    assert not (file.parent / "study").exists()
    file.write_text("processes = 2\n" + file.read_text())
    assert sweep(file, "--list").stdout.startswith(
        f"torchrun --standalone --nproc-per-node 2 -m dsv3_megatron train --train-iters {STEPS}")


def test_checkpoints_of_finished_runs_may_go(sweep: Sweep, file: Path) -> None:
    file.write_text("keep_checkpoints = false\n" + file.read_text())
    assert sweep(file).returncode == 0
    require_whole(file)
    assert not list(file.parent.glob("study/*/*/checkpoints"))
    assert "6 of them finished before" in sweep(file).stderr
