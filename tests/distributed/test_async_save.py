"""Checkpoints that are written while training goes on: they hold the step at which they were begun, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from dsv3_megatron.checkpoint.background import BackgroundWriter
from dsv3_megatron.checkpoint.folder import (
    CheckpointError,
    RunProgress,
    iteration_path,
    latest_iteration,
    read_manifest,
    saved_iterations,
)
from dsv3_megatron.checkpoint.pending import PendingSave
from dsv3_megatron.checkpoint.store import load_checkpoint, save_checkpoint, start_checkpoint
from tests.distributed.launch import RankError, run_ranks
from tests.distributed.small_run import GLOBAL_BATCH, SEQ_LENGTH, Training, differences, small_run, start

pytestmark = pytest.mark.distributed

# Everything that a checkpoint can hold besides weights and biases, some of it converted for the file.
CHANGES = {"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16", "ema_decay": 0.9, "expert_model_parallel_size": 2}


def progress_at(iteration: int, guards: dict[str, Any]) -> RunProgress:
    return RunProgress(iteration, iteration * GLOBAL_BATCH, iteration * GLOBAL_BATCH * SEQ_LENGTH, guards)


def begin(training: Training, directory: Path, progress: RunProgress, background: BackgroundWriter | None,
          keep_last: int = 0) -> PendingSave:
    return start_checkpoint(directory, progress, training.run, training.chunks, training.optimizer, training.groups,
                            keep_last=keep_last, average=training.average, background=background)


def wait_until_over(pending: PendingSave, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not pending.is_over():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ---- bits ----


def save_both_ways(folder: Path) -> list[bool]:
    """Each step's state saved at once, and behind the next step; whether each was still being written after that."""
    training = start(small_run(**CHANGES))
    background = BackgroundWriter()
    was_under_way = []
    window: list[float] = []  # as the guards': one list, which every step adds to
    training.step(0)
    for iteration in range(1, 5):
        window.append(iteration / 3)
        progress = progress_at(iteration, {"counters": {"window": window}})
        save_checkpoint(folder / "at-once", progress, training.run, training.chunks, training.optimizer,
                        training.groups, keep_last=0, average=training.average)
        background.prepare(0)
        assert background.pid is not None
        # The process that writes gets no further than to read the name of the file, until the next step is done.
        os.kill(background.pid, signal.SIGSTOP)
        pending = begin(training, folder / "behind", progress, background)
        training.step(iteration)
        window.append(-1.0)
        was_under_way.append(not pending.is_over())
        os.kill(background.pid, signal.SIGCONT)
        if iteration % 2:
            wait_until_over(pending)
        pending.finish()
    background.close()
    return was_under_way


def test_every_save_is_that_of_its_step(tmp_path: Path) -> None:
    assert run_ranks(2, save_both_ways, tmp_path) == [[True] * 4] * 2
    assert saved_iterations(tmp_path / "behind") == [1, 2, 3, 4] and latest_iteration(tmp_path / "behind") == 4
    seen = set()
    for iteration in range(1, 5):
        at_once, behind = (iteration_path(tmp_path / name, iteration) for name in ("at-once", "behind"))
        names = sorted(path.name for path in at_once.iterdir())
        assert names == sorted(path.name for path in behind.iterdir())
        assert [name for name in names if name.endswith(".distcp")] == ["__0_0.distcp", "__1_0.distcp"]
        assert index_of(at_once) == index_of(behind)
        for name in set(names) - {".metadata"}:
            content = (at_once / name).read_bytes()
            if name == "checkpoint.json":
                contents = [json.loads((path / name).read_text()) for path in (at_once, behind)]
                for manifest in contents:  # they have size and checksum of the index in them
                    del manifest["files"][".metadata"], manifest["checksums"][".metadata"]
                    del manifest["manifest_checksum"]
                assert contents[0] == contents[1]
                continue
            assert (behind / name).read_bytes() == content, f"{name} of iteration {iteration}"
            if name.endswith(".distcp"):
                seen.add(content)
    assert len(seen) == 8, "every step has changed every file"


def index_of(path: Path) -> tuple[Any, Any]:
    """What the index says, but for the name and the random mark that torch gives to every save."""
    metadata = FileSystemReader(path).read_metadata()
    return metadata.state_dict_metadata, metadata.storage_data


# ---- failures ----


def fail_behind(folder: Path) -> dict[str, Any]:
    """Saves that go wrong behind training; what each rank is told, and what is there afterwards."""
    training = start(small_run(expert_model_parallel_size=2))
    background, rank = BackgroundWriter(), torch.distributed.get_rank()
    told: dict[str, Any] = {}

    def outcome(name: str, *, is_polled: bool) -> None:
        if is_polled:
            wait_until_over(pending)
        try:
            pending.finish()
            told[name] = "no error"
        except CheckpointError as error:
            told[name] = str(error)
        told[name, "left"] = sorted(path.name for path in folder.iterdir())
        torch.distributed.barrier()

    training.step(0)
    pending = begin(training, folder, progress_at(1, {}), background)
    outcome("sound", is_polled=False)

    background.prepare(0)
    if rank == 1:
        os.kill(background.pid or 0, signal.SIGSTOP)
    pending = begin(training, folder, progress_at(2, {}), background)
    if rank == 1:
        os.kill(background.pid or 0, signal.SIGKILL)
    outcome("killed", is_polled=True)

    # The file is there already: it is not this save's, and stays as it is.
    taken = folder / "iter_0000003.saving" / "__1_0.distcp"
    if rank == 1:
        background.prepare(0)
        os.kill(background.pid or 0, signal.SIGSTOP)
    pending = begin(training, folder, progress_at(3, {}), background)
    if rank == 1:
        taken.write_bytes(b"another's")
        os.kill(background.pid or 0, signal.SIGCONT)
    outcome("taken", is_polled=True)

    pending = begin(training, folder, progress_at(4, {}), background)
    outcome("sound again", is_polled=True)
    background.close()
    return told


def test_a_save_that_fails_behind_training_is_told_to_every_rank(tmp_path: Path) -> None:
    told = run_ranks(2, fail_behind, tmp_path)
    assert told[0] == told[1]
    first = told[0]
    assert first["sound"] == first["sound again"] == "no error"
    assert "iteration 2 could not be saved: process 1: the process that writes checkpoints has ended with code -9" in (
        first["killed"])
    assert first["killed"].endswith("the newest checkpoint is still that of iteration 1")
    assert "process 1: File exists" in first["taken"]
    for name in ("killed", "taken"):
        assert first[name, "left"] == ["iter_0000001", "latest_checkpointed_iteration.txt"]
    assert read_manifest(tmp_path).progress.iteration == 4


def without_memory(folder: Path) -> list[Any]:
    """A save on ranks of which one has not the memory for a copy."""
    training = start(small_run(expert_model_parallel_size=2))
    background, rank = BackgroundWriter(), torch.distributed.get_rank()
    training.step(0)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr("dsv3_megatron.checkpoint.host_image.free_host_bytes", lambda: 1000)
        pending = begin(training, folder, progress_at(1, {}), background)
    training.step(1)
    path = pending.finish()
    state = training.whole_state()
    load_checkpoint(folder, training.run, training.chunks, training.optimizer, training.groups)
    is_older = bool(differences(state, training.whole_state()))
    background.close()
    return [path.name, background.refusal, is_older]


def test_a_host_without_the_memory_has_training_wait(tmp_path: Path) -> None:
    for name, refusal, is_older in run_ranks(2, without_memory, tmp_path):
        assert name == "iter_0000001" and is_older
        assert refusal.startswith("process 1: a copy of the checkpoint takes 0.00 GB of this host's memory, 0.00 GB")


# ---- whole runs ----


def saves_behind_until_killed(directory: Path) -> None:
    """A rank that is killed while its process writes."""
    training = start(small_run())
    background = BackgroundWriter()
    training.step(0)
    begin(training, directory, progress_at(1, {}), background).finish()
    training.step(1)
    os.kill(background.pid or 0, signal.SIGSTOP)
    begin(training, directory, progress_at(2, {}), background)
    (directory / "pid").write_text(str(background.pid))
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_process_that_writes_ends_with_a_rank_that_is_killed(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="exit code -9"):
        run_ranks(1, saves_behind_until_killed, tmp_path)
    process = Path("/proc") / (tmp_path / "pid").read_text()
    deadline = time.monotonic() + 10
    while process.exists() and "\nState:\tZ" not in (process / "status").read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not process.exists() or "\nState:\tZ" in (process / "status").read_text()
    assert latest_iteration(tmp_path) == 1 and read_manifest(tmp_path).progress.iteration == 1
