"""Checkpoint folders without their tensors: no step of a save may cost the checkpoint before it, and errors name it."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dsv3_megatron.checkpoint import folder as layout
from dsv3_megatron.checkpoint.folder import (
    TRACKER,
    CheckpointError,
    RunProgress,
    begin_save,
    check_architecture,
    check_save_directory,
    finish_save,
    iteration_path,
    latest_iteration,
    read_manifest,
    remove_old,
    saved_iterations,
)
from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.presets import preset
from dsv3_megatron.data.checksums import checksum_file

VERSIONS = {"dsv3_megatron": "0", "torch": "0", "megatron_core": "0"}


def save(directory: Path, iteration: int, content: str = "tensors", run: dict[str, Any] | None = None) -> None:
    folder = begin_save(directory, iteration)
    (folder / "__0_0.distcp").write_text(content)
    finish_save(directory, RunProgress(iteration, 2 * iteration, 3 * iteration), run or preset("tiny").as_dict(),
                versions=VERSIONS, world_size=1, precision="fp32")


def contents(directory: Path) -> str:
    manifest = read_manifest(directory)
    return f"{manifest.progress.iteration} {(manifest.path / '__0_0.distcp').read_text()}"


def test_a_file_that_is_shorter_than_what_was_written_makes_no_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1)
    folder = begin_save(tmp_path, 2)
    (folder / "__0_0.distcp").write_text("tensors")
    whole = checksum_file(folder / "__0_0.distcp")
    (folder / "__0_0.distcp").write_text("tens")
    with pytest.raises(CheckpointError, match="__0_0.distcp has 4 bytes, 7 were written"):
        finish_save(tmp_path, RunProgress(2, 4, 6), preset("tiny").as_dict(), versions=VERSIONS, world_size=1,
                    precision="fp32", checksums={"__0_0.distcp": whole})
    assert contents(tmp_path) == "1 tensors"


class Crash(Exception):
    """The process ends here."""


@pytest.fixture
def crash_at(monkeypatch):
    """Have the n-th change to the disk, counted from 0, fail before or after it takes effect."""
    real = {(owner, name): getattr(owner, name) for owner, name in (
        (os, "mkdir"), (os, "rename"), (os, "replace"), (os, "fsync"), (layout.shutil, "rmtree"))}
    changes_made = 0

    def crashing(action, number, after, *args, **kwargs):
        nonlocal changes_made
        changes_made += 1
        if changes_made == number + 1 and not after:
            raise Crash
        result = action(*args, **kwargs)
        if changes_made == number + 1:
            raise Crash
        return result

    @contextlib.contextmanager
    def install(number: int, after: bool):
        nonlocal changes_made
        changes_made = 0
        with monkeypatch.context() as patch:
            for (owner, name), action in real.items():
                patch.setattr(owner, name, functools.partial(crashing, action, number, after))
            yield lambda: changes_made

    return install


@pytest.mark.parametrize("iteration", [2, 1], ids=["next", "same-again"])
def test_crash_at_each_step_keeps_the_previous_checkpoint(tmp_path, crash_at, iteration):
    step, steps = 0, 1
    while step < steps:
        for after in (False, True):
            directory = tmp_path / f"{step}{after}"
            save(directory, 1, "first")
            with crash_at(step, after) as changes_made, contextlib.suppress(Crash):
                save(directory, iteration, "second")
            steps = max(steps, changes_made() + 1)
            assert contents(directory) in ("1 first", f"{iteration} second"), f"crash at step {step}, after={after}"
            save(directory, 3, "third")
            assert contents(directory) == "3 third"
            names = {entry.name for entry in directory.iterdir()}
            assert names <= {"iter_0000001", "iter_0000002", "iter_0000003", TRACKER}
        step += 1
    assert steps >= 10


def test_killed_writer(tmp_path):
    """A process that saves without pause, killed at moments nobody chose."""
    program = (
        "import sys; from pathlib import Path; from tests.unit.checkpoint.test_folder import save\n"
        "n = int(sys.argv[2])\nprint(n, flush=True)\n"
        "while True: n += 1; save(Path(sys.argv[1]), n, str(n)); "
        "from dsv3_megatron.checkpoint.folder import remove_old; remove_old(sys.argv[1], n, 2)")
    save(tmp_path, 1, "1")
    for moment in range(6):
        latest = latest_iteration(tmp_path)
        writer = subprocess.Popen([sys.executable, "-c", program, str(tmp_path), str(latest)], text=True,
                                  stdout=subprocess.PIPE, cwd=Path(__file__).parents[3])
        assert writer.stdout is not None and writer.stdout.readline()
        try:
            writer.wait(timeout=0.05 + 0.037 * moment)
        except subprocess.TimeoutExpired:
            writer.kill()
        writer.wait()
        writer.stdout.close()
        number, text = contents(tmp_path).split()
        assert number == text


def test_progress_comes_back(tmp_path):
    assert latest_iteration(tmp_path) is None
    save(tmp_path, 7)
    assert latest_iteration(tmp_path) == 7
    assert read_manifest(tmp_path).progress == RunProgress(7, 14, 21)
    assert (tmp_path / "iter_0000007" / "__0_0.distcp").exists()


@pytest.mark.parametrize(
    ("keep_last", "kept"), [(0, [1, 2, 3, 4, 9]), (1, [4, 9]), (2, [3, 4, 9]), (9, [1, 2, 3, 4, 9])])
def test_remove_old(tmp_path, keep_last, kept):
    """Iteration 9 is of a run that was wound back: newer than the newest saved, and not touched."""
    for iteration in (9, 1, 2, 3, 4):
        save(tmp_path, iteration)
    removed = remove_old(tmp_path, 4, keep_last)
    assert saved_iterations(tmp_path) == kept
    assert sorted(removed + kept) == [1, 2, 3, 4, 9]


def test_architecture_of_this_run_and_of_a_longer_context(tmp_path):
    run = preset("tiny")
    save(tmp_path, 1, run=json.loads(json.dumps(run.as_dict())))
    check_architecture(tmp_path, run)
    check_architecture(tmp_path, run.override(rope_type="yarn", max_position_embeddings=8192, init_method_std=0.5))


def test_another_architecture(tmp_path):
    run = preset("tiny")
    save(tmp_path, 1, run=run.as_dict())
    with pytest.raises(ConfigError) as caught:
        check_architecture(tmp_path, run.override(num_experts=16, hidden_size=64))
    message = str(caught.value)
    assert "hidden_size=64 (checkpoint: 128)" in message and "num_experts=16 (checkpoint: 8)" in message
    assert "iter_0000001 is of another architecture" in message and "preset 'tiny'" in message
    assert "or another folder" in message


def test_fields_of_other_versions(tmp_path):
    """A field that an older version did not write has its default; one of a newer version is named."""
    run = preset("tiny").as_dict()
    run["model"] = {key: value for key, value in run["model"].items() if key != "layernorm_epsilon"}
    save(tmp_path, 1, run=run)
    check_architecture(tmp_path, preset("tiny"))
    save(tmp_path, 2, run={**run, "model": {**run["model"], "num_dreams": 3}})
    with pytest.raises(ConfigError, match=r"num_dreams, which this version does not know \(checkpoint: 3\)"):
        check_architecture(tmp_path, preset("tiny"))


def test_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=f"load={tmp_path} has no checkpoint: no {TRACKER} in it$"):
        read_manifest(tmp_path)
    with pytest.raises(CheckpointError, match="load=/no/such/folder has no checkpoint"):
        read_manifest("/no/such/folder")
    save(tmp_path, 5)
    (tmp_path / TRACKER).unlink()
    with pytest.raises(CheckpointError, match="to use one that is there, write 5 into that file"):
        read_manifest(tmp_path)


def test_tracker_names_a_missing_checkpoint(tmp_path):
    for iteration in (1, 2):
        save(tmp_path, iteration)
    (tmp_path / TRACKER).write_text("300\n")
    with pytest.raises(CheckpointError, match=rf"names iteration 300, but .*0300 is missing; write 2 into {TRACKER}"):
        read_manifest(tmp_path)


def test_tracker_holds_nonsense(tmp_path):
    save(tmp_path, 1)
    (tmp_path / TRACKER).write_text("release")
    with pytest.raises(CheckpointError, match="holds 'release'; it must hold the iteration .*; write 1 into it"):
        latest_iteration(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "gone", "manifest cut", "manifest gone", "newer format"])
def test_damaged_checkpoint_names_the_one_before(tmp_path, damage):
    for iteration in (1, 2, 3):
        save(tmp_path, iteration)
    (iteration_path(tmp_path, 2) / "__0_0.distcp").unlink()
    path = iteration_path(tmp_path, 3)
    manifest, tensors = path / "checkpoint.json", path / "__0_0.distcp"
    if damage == "cut":
        tensors.write_text("tens")
    elif damage == "gone":
        tensors.unlink()
    elif damage == "manifest cut":
        manifest.write_text(manifest.read_text()[:100])
    elif damage == "manifest gone":
        manifest.unlink()
    else:
        manifest.write_text(manifest.read_text().replace('"format_version": 2', '"format_version": 99'))
    with pytest.raises(CheckpointError) as caught:
        read_manifest(tmp_path)
    message = str(caught.value)
    assert f"checkpoint {path} is truncated or corrupt: " in message
    expected = {"cut": "__0_0.distcp has 4 bytes, 7 were written", "gone": "__0_0.distcp is missing, 7 were written",
                "manifest cut": "checkpoint.json: ", "manifest gone": "No such file",
                "newer format": "format_version=99 is newer"}[damage]
    assert expected in message
    # Iteration 2 is damaged as well.
    assert message.endswith(f"write 1 into {tmp_path / TRACKER} (the newest complete checkpoint there)")


def test_only_checkpoint_damaged(tmp_path):
    save(tmp_path, 1)
    (iteration_path(tmp_path, 1) / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match="there is no other complete checkpoint there"):
        read_manifest(tmp_path)


def test_save_directory(tmp_path):
    check_save_directory(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="save=.*file/folder cannot be written to: .*; choose a folder"):
        check_save_directory(tmp_path / "file" / "folder")
    with pytest.raises(CheckpointError, match="save=/proc cannot be written to"):
        check_save_directory("/proc")
    (tmp_path / f".writable.{os.uname().nodename}.{os.getpid()}").symlink_to(tmp_path / "file")
    (tmp_path / "file").write_text("of another matter")
    check_save_directory(tmp_path)
    assert (tmp_path / "file").read_text() == "of another matter"


def test_no_torch_is_imported():
    program = ("import sys, dsv3_megatron.checkpoint.folder\n"
               "assert not {'torch', 'megatron', 'numpy'} & sys.modules.keys()")
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[3])
