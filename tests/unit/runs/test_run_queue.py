"""What a queue refuses, and what it shares out; whole sweeps are in tests/unit/commands/test_sweep.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.sweep_file import SweepRun
from dsv3_megatron.guards.claims import LOCK_FILE
from dsv3_megatron.guards.lock import RunLock
from dsv3_megatron.process.ranks import Processes
from dsv3_megatron.runs.run_queue import STATE, RunQueue, code_of, is_held, visible_gpus


@pytest.fixture
def run(tmp_path: Path) -> SweepRun:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    return SweepRun("a", 1, tmp_path / "run", ("--lr", "0.1", "--seed", "1"))


def test_a_state_is_read_and_one_of_other_settings_is_refused(run: SweepRun) -> None:
    assert code_of(run) is None
    state = run.folder / STATE
    state.write_text(json.dumps({"words": list(run.own_words), "code": 3}))
    assert code_of(run) == 3
    state.write_text(json.dumps({"words": ["--lr", "0.2", "--sft", "--seed", "1"], "code": None}))
    with pytest.raises(ConfigError, match=r"holds a run with other settings \(0.2 --sft, now 0.1\)"):
        code_of(run)
    state.write_text("{")
    with pytest.raises(ConfigError, match="state.json cannot be read .* to have the run done again"):
        code_of(run)


def test_a_run_whose_process_is_still_there_is_waited_for(run: SweepRun) -> None:
    assert not is_held(run)
    lock = RunLock(run.checkpoints / LOCK_FILE, "r", "save")
    lock.take()
    assert not is_held(run), "this process's own lock is none to wait for"
    holder = json.loads((run.checkpoints / LOCK_FILE).read_text())
    (run.checkpoints / LOCK_FILE).write_text(json.dumps(holder | {"pid": 1, "began": None}))
    assert is_held(run)


@pytest.mark.parametrize(("at_a_time", "processes", "message"), [
    (3, 2, "at_a_time=3 x processes=2 need a GPU each, and there are 4: try at_a_time = 2"),
    (1, 8, "at_a_time=1 x processes=8 need a GPU each, and there are 4: try fewer processes"),
])
def test_gpus_are_not_shared(at_a_time: int, processes: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunQueue("train", at_a_time=at_a_time, processes=processes, gpus=list("0123"))
    RunQueue("train", at_a_time=2, processes=2, gpus=list("0123"))


def test_processes_of_a_run_are_torchruns_and_do_not_take_the_sweeps_own_place(
        run: SweepRun, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    queue = RunQueue("sft", at_a_time=10_000, processes=4)
    assert queue._words(run)[1:5] == ["-m", "dsv3_megatron.platform.local_torchrun", "--nproc-per-node", "4"]
    assert queue._words(run)[7:10] == ["-m", "dsv3_megatron", "sft"]
    variables = queue._environment(run, ("2", "3"))
    assert Processes.from_environment(variables) == Processes()
    assert variables["CUDA_VISIBLE_DEVICES"] == "2,3" and variables["OMP_NUM_THREADS"] == "1"


def test_gpus_are_those_that_cuda_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: x'\necho '  MIG y'\necho 'GPU 1: x'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert visible_gpus() == ["1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []
    tool.unlink()
    assert visible_gpus() == []
