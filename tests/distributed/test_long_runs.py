"""Disks that go away while a run goes on, for logs and for checkpoints: they cost no step, and are said."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from dsv3_megatron.checkpoint.folder import latest_iteration, saved_iterations
from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.guards.claims import identity_of
from tests.distributed.launch import run_ranks
from tests.distributed.small_run import small_run
from tests.made_up_texts import write_texts

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset of made-up documents; its prefix."""
    return write_texts(tmp_path_factory.mktemp("data") / "train", 60)


@dataclass
class Told:
    """What a run did.

    Attributes:
        code: Exit code; None: it ended with an error.
        losses: Loss of each step.
        said: Lines for people.
        error: The error.
    """

    code: int | None
    losses: list[float]
    said: list[str]
    error: str = ""


def run_with(data: str, folder: Path, events: dict[int, Callable[[Any, Path], None]], **changes: Any) -> Told:
    """A run in which something happens after some steps, before they are reported."""
    from megatron.core import parallel_state

    from dsv3_megatron.runs.trainer import Trainer

    run = small_run(**{
        "num_layers": 2, "data_path": [data], "split": "100,0,0", "eval_interval": 0, "train_iters": 8,
        "lr_warmup_iters": 0, "lr_decay_style": "constant", "log_interval": 1, "save_interval": 2,
        "save": str(folder / "saved"), "load": str(folder / "saved"), "tensorboard_dir": str(folder / "logs"),
        **changes})
    run.validate(1)
    losses: list[float] = []

    class Watched(Trainer):
        def train_step(self) -> Any:
            report, stopped = super().train_step()
            losses.append(report.lm_loss)
            if report.iteration in events:
                events[report.iteration](self, folder)
            return report, stopped

    said: list[str] = []
    with mock.patch("dsv3_megatron.runs.trainer.destroy_groups"):
        trainer = Watched(run)
        trainer.display.message = said.append  # type: ignore[method-assign]
        try:
            told = Told(trainer.train(), losses, said)
        except ConfigError as error:
            told = Told(None, losses, said, str(error))
    parallel_state.destroy_model_parallel()
    return told


# ---- what happens ----


def take_away(name: str) -> Callable[[Any, Path], None]:
    """A folder of the run's is gone, and a file has its name: nothing can be made there, as on a mount that is lost."""
    def happen(trainer: Any, folder: Path) -> None:
        trainer.keeper.finish(trainer.iteration)
        os.rename(folder / name, folder / f"{name}.away")
        (folder / name).write_text("not a folder")

    return happen


def give_back(name: str) -> Callable[[Any, Path], None]:
    def happen(_trainer: Any, folder: Path) -> None:
        (folder / name).unlink()
        os.rename(folder / f"{name}.away", folder / name)

    return happen


def remove_logs(_trainer: Any, folder: Path) -> None:
    shutil.rmtree(folder / "logs")


def fill_disk(trainer: Any, _folder: Path) -> None:
    """No file of the process that writes can grow beyond 100 KB any more; a checkpoint has a megabyte.

    The checkpoint that is still being written, if there is one, is finished before the disk is full.
    """
    trainer.keeper.finish(trainer.iteration)
    background = trainer.keeper._background
    background.prepare(0)
    resource.prlimit(background.pid, resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))


def make_room(trainer: Any, _folder: Path) -> None:
    resource.prlimit(trainer.keeper._background.pid, resource.RLIMIT_FSIZE,
                     (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def lose_disks(data: str, folder: Path) -> dict[str, Told]:
    """Each kind of loss in a run of its own, beside one without any."""
    def run(name: str, events: dict[int, Callable[[Any, Path], None]], **changes: Any) -> Told:
        (folder / name).mkdir()
        return run_with(data, folder / name, events, **changes)

    return {
        "undisturbed": run("undisturbed", {}),
        "logs removed": run("logs removed", {5: remove_logs}, train_iters=6),
        "logs resumed": run_with(data, folder / "logs removed", {}),
        "logs lost": run("logs lost", {3: take_away("logs"), 6: give_back("logs")}),
        "checkpoints lost": run("checkpoints lost", {3: take_away("saved"), 6: give_back("saved")}),
        "disk full": run("disk full", {3: fill_disk, 6: make_room}),
        "disk full for good": run("disk full for good", {3: fill_disk}, max_failed_saves=1),
    }


def test_disks_that_go_away_cost_no_step(data: str, tmp_path: Path) -> None:
    (told,) = run_ranks(1, lose_disks, data, tmp_path)
    losses = told["undisturbed"].losses
    assert len(losses) == 8
    for name in ("logs lost", "checkpoints lost", "disk full"):
        assert told[name].code == 0 and told[name].losses == losses, (name, told[name].error)
        assert latest_iteration(tmp_path / name / "saved") == 8
    # Whose logs they are is said again where it was lost: the run goes on in the same folder.
    assert told["logs removed"].code == 0 and told["logs removed"].losses == losses[:6]
    assert told["logs resumed"].code == 0 and told["logs resumed"].losses == losses[6:]
    logs, saved = tmp_path / "logs removed" / "logs", tmp_path / "logs removed" / "saved"
    assert identity_of(logs) == identity_of(saved) is not None

    said = "\n".join(told["checkpoints lost"].said)
    assert "no checkpoint of iteration 4: save=" in said and "That is 1 in a row, of 16 that may fail" in said
    assert "tries again after iteration 5" in said and "in a row, of 16 that may fail" in said
    assert [text for text in told["checkpoints lost"].said if text.startswith("checkpoint saved")][0].endswith("2")

    said = "\n".join(told["disk full"].said)
    assert "iteration 4 could not be saved: process 0: File too large" in said
    assert saved_iterations(tmp_path / "disk full" / "saved")[-1] == 8

    ended = told["disk full for good"]
    assert ended.code is None and 4 < len(ended.losses) <= 8
    assert "File too large" in ended.error and "2 in a row, more than max_failed_saves=1: the run ends" in ended.error
    assert latest_iteration(tmp_path / "disk full for good" / "saved") == 2
