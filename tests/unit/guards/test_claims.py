"""What a start may do in folders that are already in use: go on, start fresh, or nothing at all."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from pathlib import Path

import pytest

from dsv3_megatron.checkpoint.folder import (
    TRACKER,
    WEIGHTS,
    CheckpointError,
    RunProgress,
    begin_save,
    finish_save,
    iteration_path,
    saved_iterations,
)
from dsv3_megatron.config.presets import preset
from dsv3_megatron.config.training import CheckpointConfig
from dsv3_megatron.guards.claims import RunClaim, Start, identity_of

EVENTS = "events.out.tfevents.1.host.2.0"


def checkpoint(folder: Path, iteration: int, run: str | None, contents: str = "training") -> None:
    (begin_save(folder, iteration) / "__0_0.distcp").write_text(f"{run} {iteration}")
    finish_save(folder, RunProgress(iteration, 1, 1), preset("tiny").as_dict(), versions={}, world_size=1,
                precision="fp32", contents=contents, run_id=run)


def config(tmp_path: Path, **values: object) -> CheckpointConfig:
    folders = {name: str(tmp_path / value) for name, value in values.items()
               if isinstance(value, str) and name != "resume"}
    return CheckpointConfig(**(values | folders))  # type: ignore[arg-type]


def start(tmp_path: Path, *, steps: int = 0, logs: str | None = "logs", **values: object) -> Start:
    """A run from start to end, in which it logs and, if it takes steps, saves the last one."""
    claim = RunClaim(config(tmp_path, **values), str(tmp_path / logs) if logs else None, stale_s=1.0)
    begun = claim.take()
    claim.settle()
    if logs:
        with (tmp_path / logs / "metrics.jsonl").open("a") as file:
            file.write('{"kind":"step","iteration":1}\n')
        (tmp_path / logs / EVENTS).write_bytes(b"events")
    if steps:
        checkpoint(tmp_path / str(values["save"]), steps, begun.run)
    claim.release()
    return begun


def files_of(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(tmp_path: Path, *, logs: str | None = "logs", **values: object) -> str:
    """Why a run may not start; the pre-check says the same, and nothing is touched."""
    before = files_of(tmp_path)
    claim = RunClaim(config(tmp_path, **values), str(tmp_path / logs) if logs else None, stale_s=1.0)
    with pytest.raises(CheckpointError) as looked:
        claim.look()
    with pytest.raises(CheckpointError) as taken:
        claim.take()
    assert str(looked.value) == str(taken.value)
    assert files_of(tmp_path) == before
    return str(taken.value)


def test_auto_goes_on_if_there_is_something_to_go_on_from(tmp_path: Path) -> None:
    """`--save X --resume auto`: begins, begins again after an end without a checkpoint, goes on; one identity."""
    first, again = (start(tmp_path, save="ck", resume="auto", steps=steps) for steps in (0, 5))
    later = start(tmp_path, save="ck", resume="auto", steps=9)
    assert (first.load, again.load, later.load) == (None, None, str(tmp_path / "ck"))
    assert first.run == again.run == later.run and later.iteration == 5


def test_auto_takes_weights_of_others_for_the_first_start_alone(tmp_path: Path) -> None:
    checkpoint(tmp_path / "converted", 0, None, contents=WEIGHTS)
    first = start(tmp_path, save="ck", load="converted", resume="auto", steps=3)
    later = start(tmp_path, save="ck", load="converted", resume="auto", steps=7)
    assert (first.load, later.load) == (str(tmp_path / "converted"), str(tmp_path / "ck"))
    assert later.iteration == 3 and later.run == first.run
    assert later.notes[0].startswith(f"resume=auto: the run goes on from save={tmp_path / 'ck'}")
    assert "holds 2 checkpoint(s)" in refused(tmp_path, save="ck", load="converted")  # without it as ever


def test_auto_does_not_take_others_logs(tmp_path: Path) -> None:
    start(tmp_path, save="other", steps=5)
    assert f"tensorboard_dir={tmp_path / 'logs'} holds the logs" in refused(tmp_path, save="ck", resume="auto")


def test_the_first_start_and_later_ones_with_the_same_flags(tmp_path: Path) -> None:
    """`--save X --load X`: fresh, killed before its first checkpoint, then from its checkpoints; one identity."""
    first = start(tmp_path, save="ck", load="ck")
    assert first.load is None and first.notes == (
        f"load={tmp_path / 'ck'} has no checkpoint: a fresh run starts (--exit-on-missing-checkpoint ends instead)",)
    again = start(tmp_path, save="ck", load="ck", steps=5)
    later = start(tmp_path, save="ck", load="ck", steps=9)
    assert again.load is None and later.load == str(tmp_path / "ck") and later.notes == ()
    assert first.run == again.run == later.run == identity_of(tmp_path / "ck") == identity_of(tmp_path / "logs")
    assert saved_iterations(tmp_path / "ck") == [5, 9]
    manifest = json.loads((iteration_path(tmp_path / "ck", 9) / "checkpoint.json").read_text())
    assert manifest["run_id"] == first.run


@pytest.mark.parametrize("load", ["missing", "empty"])
def test_an_empty_or_missing_folder_to_load_can_be_an_error(tmp_path: Path, load: str) -> None:
    (tmp_path / "empty").mkdir()
    assert "has no checkpoint: a fresh run starts" in start(tmp_path, save="ck", load=load, logs=None).notes[0]
    message = refused(tmp_path, save="other", load=load, logs=None, exit_on_missing_checkpoint=True)
    assert f"load={tmp_path / load} has no checkpoint: no {TRACKER} in it; leave out --exit-on" in message


def test_what_is_no_checkpoint_of_a_run_is_not_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "model.safetensors").write_text("")
    assert "convert it first" in refused(tmp_path, save="ck", load="hf")
    checkpoint(tmp_path / "old", 3, None)
    assert f"give the folder above it, {tmp_path / 'old'}" in refused(tmp_path, save="ck", load="old/iter_0000003")
    (tmp_path / "file").write_text("")
    assert "is not a folder" in refused(tmp_path, save="ck", load="file")
    (tmp_path / "old" / TRACKER).unlink()
    assert "write 3 into that file" in refused(tmp_path, save="ck", load="old")


def test_a_forgotten_load_touches_nothing(tmp_path: Path) -> None:
    run = start(tmp_path, save="ck", steps=5).run
    message = refused(tmp_path, save="ck", logs="other")
    assert f"save={tmp_path / 'ck'} holds 1 checkpoint(s), the newest of iteration 5, of run {run}" in message
    for way_out in (f"Go on from them with --load {tmp_path / 'ck'}", "choose another folder", "--overwrite-run"):
        assert way_out in message
    message = refused(tmp_path, save="other")
    assert f"tensorboard_dir={tmp_path / 'logs'} holds the logs (metrics.jsonl) of run {run}, not of this" in message
    assert f"go on as that run with --load {tmp_path / 'ck'}, or" in message
    assert "holds 1 checkpoint(s)" in refused(tmp_path, save="ck", load="elsewhere")
    assert "holds the logs" in refused(tmp_path, save="new", load="elsewhere"), "a fresh run all the same"


@pytest.mark.parametrize("name", ["metrics.jsonl", "guards.jsonl", EVENTS])
def test_any_log_counts(tmp_path: Path, name: str) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / name).write_text("something")
    assert f"holds the logs ({name}) of another run" in refused(tmp_path, save="ck")
    (tmp_path / "logs" / name).rename(tmp_path / "logs" / "notes.txt")
    assert start(tmp_path, save="ck").load is None


def test_a_start_that_took_no_step_is_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "metrics.jsonl").touch()
    (tmp_path / "logs" / EVENTS).write_bytes(b"configuration")
    start(tmp_path, save="ck")


def test_another_runs_folders_on_resume(tmp_path: Path) -> None:
    start(tmp_path, save="one", logs="one-logs", steps=5)
    start(tmp_path, save="two", logs="two-logs", steps=3)
    assert "holds the logs" in refused(tmp_path, save="one", load="one", logs="two-logs")
    assert "is another folder" in refused(tmp_path, save="two", load="one", logs="one-logs")
    # The same run, in another folder for its checkpoints, further on there, and a copy.
    moved = start(tmp_path, save="moved", load="one", logs="one-logs", steps=8)
    assert moved.run == identity_of(tmp_path / "one") == identity_of(tmp_path / "moved")
    assert "the newest of iteration 8" in refused(tmp_path, save="moved", load="one", logs="one-logs")
    start(tmp_path, save="one", load="moved", logs="one-logs", steps=9)
    (tmp_path / "link").symlink_to(tmp_path / "one")
    start(tmp_path, save="one", load="link", logs="one-logs")


def test_checkpoints_and_logs_of_an_older_version_go_on(tmp_path: Path) -> None:
    checkpoint(tmp_path / "ck", 5, None)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "metrics.jsonl").write_text('{"kind":"step","iteration":1}\n')
    assert "holds the logs" in refused(tmp_path, save="ck", load="ck")
    (tmp_path / "logs" / "config.json").write_text(json.dumps({"checkpoint": {"save": str(tmp_path / "ck")}}))
    assert "holds the logs" in refused(tmp_path, save="other"), "not without --load"
    run = start(tmp_path, save="ck", load="ck").run
    assert run == identity_of(tmp_path / "ck") == identity_of(tmp_path / "logs")
    assert start(tmp_path, save="ck", load="ck", steps=6).run == run


def test_weights_start_new_runs(tmp_path: Path) -> None:
    checkpoint(tmp_path / "converted", 0, None, contents=WEIGHTS)
    first = start(tmp_path, load="converted", save="one", logs="one-logs")
    assert first.load == str(tmp_path / "converted")
    second = start(tmp_path, load="converted", save="two", logs="two-logs")
    assert first.run != second.run
    # Ended before its first checkpoint, and started again.
    assert start(tmp_path, load="converted", save="one", logs="one-logs").run == first.run


def test_another_run_is_removed_on_request_and_not_before_the_run_starts(tmp_path: Path) -> None:
    old = start(tmp_path, save="ck", steps=5).run
    checkpoint(tmp_path / "ck", 9, old)
    (tmp_path / "ck" / "notes.txt").write_text("kept")
    before = files_of(tmp_path)
    claim = RunClaim(config(tmp_path, save="ck", overwrite_run=True), str(tmp_path / "logs"))
    claim.take()
    claim.release()  # something else kept it from starting
    assert files_of(tmp_path) == before
    new = start(tmp_path, save="ck", overwrite_run=True, steps=2).run
    assert new != old and identity_of(tmp_path / "ck") == identity_of(tmp_path / "logs") == new
    assert saved_iterations(tmp_path / "ck") == [2] and (tmp_path / "ck" / "notes.txt").exists()
    assert (tmp_path / "logs" / "metrics.jsonl").read_text().count("\n") == 1
    # What it goes on from is not another's.
    assert start(tmp_path, save="ck", load="ck", overwrite_run=True, steps=4).run == new
    assert saved_iterations(tmp_path / "ck") == [2, 4]


def test_a_run_under_way_keeps_others_out_of_each_of_its_folders(tmp_path: Path) -> None:
    claim = RunClaim(config(tmp_path, save="ck", export_hf="exported"), str(tmp_path / "logs"), stale_s=1.0)
    claim.take()
    claim.settle()
    try:
        beats = [thread.name for thread in threading.enumerate()]
        assert "run-lock" in beats
        for file in (tmp_path / "ck" / "run.lock", tmp_path / "logs" / "run.lock", tmp_path / "exported.lock"):
            content = json.loads(file.read_text())
            # Seen from another process of this machine.
            file.write_text(json.dumps({**content, "pid": 1, "began": None}))
        for folders in ({"save": "ck", "logs": None}, {"save": "other", "logs": "logs"},
                        {"save": "other", "logs": None, "export_hf": "exported"}):
            assert "is in use by run " in refused(tmp_path, **folders)  # type: ignore[arg-type]
    finally:
        claim.release()
    for file in tmp_path.rglob("*lock"):
        file.unlink()
    start(tmp_path, save="ck", export_hf="exported")
    assert not list(tmp_path.rglob("*lock")), "nothing is left at the end"


def test_one_folder_for_checkpoints_and_logs(tmp_path: Path) -> None:
    start(tmp_path, save="all", logs="all", steps=3)
    start(tmp_path, save="all", load="all", logs="all", steps=4)
    assert "holds 2 checkpoint(s)" in refused(tmp_path, save="all", logs="all")


def test_a_folder_that_is_gone_is_nobody_elses(tmp_path: Path) -> None:
    """Emptied, it says again whose it is; where nothing can be made, that ends no run; taken over, it does."""
    logs = tmp_path / "logs"
    claim = RunClaim(config(tmp_path, save="ck"), str(logs), stale_s=1.0)
    begun = claim.take()
    claim.settle()
    shutil.rmtree(logs)
    claim.check()  # the folder is not there
    logs.mkdir()
    claim.check()
    assert identity_of(logs) == begun.run and (logs / "run.lock").exists()
    shutil.rmtree(logs)
    logs.write_text("a file")
    claim.check()
    logs.unlink()
    logs.mkdir()
    claim.check()
    (logs / "run.lock").write_text("{}")
    with pytest.raises(CheckpointError, match="is no longer this run's"):
        claim.check()
    claim.release()
