"""Checkpoints as files: their names, how one appears all at once, and whether one fits a run. No torch.

    DIR/latest_checkpointed_iteration.txt   the newest complete checkpoint (Megatron-LM's tracker)
    DIR/iter_0000100/                       one checkpoint
        checkpoint.json                     progress, the run's configuration, versions; size and checksums of each file
        metadata.json, .metadata, *.distcp  written by megatron.core.dist_checkpointing

A checkpoint is written under another name, flushed to disk, and renamed; only then does the tracker
follow. So a crash at any moment leaves the tracker on a complete checkpoint.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3_megatron.checkpoint.manifest_file import flush, read_signed, require_files, signed_text
from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.json_files import read_json
from dsv3_megatron.config.model import architecture_differences
from dsv3_megatron.config.new_files import open_new, replace_text
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.data.checksums import FileChecksums, checksum_file, read_checksums

_MOST_DIGITS = 18  # of a step
TRACKER = "latest_checkpointed_iteration.txt"
MANIFEST = "checkpoint.json"
# 2: with checksums of all files, and of the manifest itself.
FORMAT_VERSION = 2
TRAINING, WEIGHTS = "training", "weights"
# Key of a weight's fp32 copy in the optimizer: this and the weight's own.
MASTER_PREFIX = "optimizer.state.param."
# Key of a weight's moving average: this and the weight's own.
AVERAGE_PREFIX = "average."
# Suffixes of what is not, or no longer, a checkpoint: being written, being removed, being replaced.
_SAVING, _REMOVING, _REPLACED = ".saving", ".removing", ".replaced"


class CheckpointError(ConfigError):
    """A checkpoint that cannot be written or used; the message names it and the way out."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint that was complete once and is not any more: an earlier one may be sound.

    Attributes:
        iteration: Step of the checkpoint.
        reasons: What each process met that read it.
    """

    def __init__(self, message: str, iteration: int, reasons: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.iteration, self.reasons = iteration, reasons

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.iteration, self.reasons)  # told to other ranks


@dataclass(frozen=True)
class RunProgress:
    """How far a run has come.

    Attributes:
        iteration: Optimizer steps done.
        consumed_samples: Sequences trained on.
        consumed_tokens: Tokens trained on.
        guards: State of the guards as plain JSON values (guards/decisions.py); empty where there were none.
        schedules: What planned its steps, as plain JSON values (config/past.py); empty where it was not recorded.
        data: Identity of the data that it reads, and where it is in them (data/identity.py); empty likewise.
    """

    iteration: int
    consumed_samples: int
    consumed_tokens: int
    guards: dict[str, Any] = dataclasses.field(default_factory=dict)
    schedules: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    data: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """The description that a checkpoint gives of itself.

    Attributes:
        path: Folder of the checkpoint.
        progress: Progress of the run that wrote it.
        run: Configuration of that run, nested plain values.
        versions: Versions of the library, torch and Megatron-Core that wrote the checkpoint.
        world_size: Processes that wrote it.
        precision: "bf16" or "fp32", of the weights as trained.
        files: Size in bytes of each of its other files, by name.
        contents: TRAINING, a run's whole state; or WEIGHTS, to start one from.
        run_id: Identity of the run that wrote it; None if it does not say.
        checksums: Checksums of each of its other files, by name; None: it is of a release that made none.
    """

    path: Path
    progress: RunProgress
    run: dict[str, Any]
    versions: dict[str, str]
    world_size: int
    precision: str
    files: dict[str, int]
    contents: str = TRAINING
    run_id: str | None = None
    checksums: dict[str, FileChecksums] | None = None


def iteration_path(directory: str | Path, iteration: int) -> Path:
    """Folder of the checkpoint of `iteration`."""
    return Path(directory) / f"iter_{iteration:07d}"


def saved_iterations(directory: str | Path) -> list[int]:
    """Iterations with a checkpoint in `directory`, in order; whether each is complete is not looked at."""
    folder = Path(directory)
    if not folder.is_dir():
        return []
    matches = (re.fullmatch(rf"iter_(\d{{7,}})({_REPLACED})?", entry.name) for entry in folder.iterdir())
    return sorted({int(match.group(1)) for match in matches if match})


def latest_iteration(directory: str | Path) -> int | None:
    """The iteration that the tracker names; None where there is no tracker.

    Raises:
        CheckpointError: the tracker holds something else than a number.
    """
    tracker = Path(directory) / TRACKER
    try:
        with open(tracker, encoding="utf-8", errors="replace") as stream:
            text = stream.read(_MOST_DIGITS + 2).strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"load={directory}: {tracker} cannot be read: {error.strerror}") from error
    if not text.isascii() or not text.isdecimal() or len(text) > _MOST_DIGITS:
        raise CheckpointError(f"{tracker} holds {text!r}; it must hold the iteration of a checkpoint"
                              + _choices(directory, "write", "into it"))
    return int(text)


def read_manifest(directory: str | Path, iteration: int | None = None) -> Manifest:
    """What the newest checkpoint in `directory`, or that of `iteration`, says of itself.

    The sizes of its files are checked, and the checksums of the manifest and of all files without tensors. Those with
    tensors are proved by what reads them.

    Raises:
        CheckpointError: there is none, or the tracker names a missing one.
        DamagedCheckpointError: the checkpoint is incomplete or damaged; the message names the newest complete one
            before it.
    """
    latest = latest_iteration(directory) if iteration is None else iteration
    if latest is None:
        raise CheckpointError(f"load={directory} has no checkpoint: no {TRACKER} in it"
                              + _choices(directory, "to use one that is there, write", "into that file"))
    path = _find(directory, latest)
    if path is None:
        named = f"names iteration {latest}" if iteration is None else f"is asked for iteration {latest}"
        raise CheckpointError(f"load={directory}: {TRACKER} {named}, but {iteration_path(directory, latest)} is missing"
                              + _choices(directory, "write", f"into {TRACKER}"))
    try:
        manifest = _parse_manifest(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(directory, latest, f"{MANIFEST}: {error}") from error
    try:
        require_files(path, manifest.files, manifest.checksums)
    except (OSError, ValueError) as error:
        raise damaged(directory, latest, str(error)) from error
    return manifest


def read_sound_manifest(directory: str | Path, iteration: int | None = None) -> tuple[Manifest, tuple[str, ...]]:
    """What the newest checkpoint says of itself that is whole as far as `read_manifest` sees, and what was passed over.

    Args:
        directory: Folder of checkpoints.
        iteration: The newest one to look at; None: that of the tracker.

    Raises:
        CheckpointError: there is none.
        DamagedCheckpointError: all of them are damaged; the error is that of the newest.
    """
    passed: list[str] = []
    first: DamagedCheckpointError | None = None
    while True:
        try:
            return read_manifest(directory, iteration), tuple(passed)
        except DamagedCheckpointError as error:
            first = first or error
            earlier = [number for number in saved_iterations(directory) if number < error.iteration]
            iteration = earlier[-1] if earlier else None
            if iteration is None:
                raise first from error
            passed.append(passed_over(directory, error, iteration))


def passed_over(directory: str | Path, error: DamagedCheckpointError, earlier: int) -> str:
    """Message about a damaged checkpoint, and the earlier one that is tried in its place."""
    return (f"CHECKPOINT {iteration_path(directory, error.iteration)} IS DAMAGED and is not used: "
            f"{'; '.join(error.reasons)}. The run goes back to {iteration_path(directory, earlier)}")


def damaged(directory: str | Path, iteration: int, *reasons: str) -> DamagedCheckpointError:
    """An error about a checkpoint that was complete once, with the newest complete one before it."""
    return DamagedCheckpointError(incomplete(directory, iteration, "; ".join(reasons)), iteration, reasons)


def incomplete(directory: str | Path, iteration: int, reason: str) -> str:
    """Message for a checkpoint that cannot be used, with the newest complete one before it."""
    return (f"checkpoint {iteration_path(directory, iteration)} is truncated or corrupt: {reason}"
            + _choices(directory, "to go on from an earlier one, write", f"into {Path(directory) / TRACKER}",
                       before=iteration))


def no_average(manifest: Manifest) -> str:
    """Message for a checkpoint that was asked for an average of the weights and has none."""
    return (f"checkpoint {manifest.path} has no average of the weights: its run had ema_decay="
            f"{manifest.run['training'].get('ema_decay', 0.0)} or has not taken a step; leave out --ema, or train on "
            "with --ema-decay 0.999")


def check_architecture(directory: str | Path, run: RunConfig, iteration: int | None = None) -> Manifest:
    """Check, before anything is allocated, that a checkpoint in `directory` is of this run's architecture: the newest,
    or that of `iteration`.

    Fields of a long-context extension may differ: they have no weights.

    Raises:
        CheckpointError: there is no usable checkpoint, or it has another architecture; the message names
            the fields and both values.
    """
    manifest = read_manifest(directory, iteration)
    stored = manifest.run.get("model", {})
    differing = architecture_differences(stored, run.model)
    if differing:
        raise CheckpointError(
            f"load={directory}: checkpoint {manifest.path.name} is of another architecture: {'; '.join(differing)}. "
            f"Use the checkpoint's values ({_began_with(manifest.run)}; all of them are in "
            f"{manifest.path / MANIFEST}), or another folder")
    return manifest


def _began_with(values: Mapping[str, Any]) -> str:
    """What gave a recorded run its architecture."""
    folder = values.get("from_hf")
    return f"preset {values.get('preset')!r}" if folder is None else f"--from-hf {folder}"


def check_save_directory(directory: str | Path) -> None:
    """Create `directory` if need be, and find out now rather than at the first save whether it can be written to.

    Raises:
        CheckpointError: the folder cannot be made or written to.
    """
    folder = Path(directory)
    probe = folder / f".writable.{os.uname().nodename}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open_new(probe) as stream:
            stream.write(b"0")
        probe.unlink()
    except OSError as error:
        raise CheckpointError(f"save={directory} cannot be written to: {error.strerror} ({error.filename}); "
                              "choose a folder that this user may write to") from error


def check_empty(output: str | Path) -> None:
    """Refuse a folder to make that has something in it already.

    Raises:
        CheckpointError: the path exists and is not an empty folder.
    """
    path = Path(output)
    if path.is_dir():
        if any(path.iterdir()):
            raise CheckpointError(f"{path} is not empty; choose another output, or remove it")
    elif path.exists() or path.is_symlink():
        raise CheckpointError(f"{path} exists and is not a folder; choose another output")


# ---- writing: these run on one process; `store.py` has the others wait ----


def begin_save(directory: str | Path, iteration: int) -> Path:
    """Clear what crashed saves left, and make the empty folder to write the checkpoint of `iteration` into."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    for entry in sorted(folder.iterdir()):
        if not re.match(r"iter_\d+\.", entry.name):
            continue
        if entry.name.endswith(_REPLACED) and not entry.with_suffix("").exists():
            # A crash between the two renames of a replacement: this one is still the checkpoint.
            os.rename(entry, entry.with_suffix(""))
        elif entry.suffix in (_SAVING, _REMOVING, _REPLACED):
            shutil.rmtree(entry)
    target = saving_path(directory, iteration)
    target.mkdir()
    return target


def remove_partial(target: Path) -> None:
    """Give back the space of a save that failed; what stays is cleared by the next one."""
    shutil.rmtree(target, ignore_errors=True)


def finish_save(directory: str | Path, progress: RunProgress, run: dict[str, Any], *, versions: dict[str, str],
                world_size: int, precision: str, contents: str = TRAINING, run_id: str | None = None,
                checksums: Mapping[str, FileChecksums] | None = None) -> Path:
    """Turn the folder that `begin_save` made, now filled, into the newest checkpoint.

    Flush its files, write its manifest, rename it, then replace the tracker: in this order. `checksums` are those that
    were made while files were written; the other files are read for theirs.
    """
    folder, written = Path(directory), saving_path(directory, progress.iteration)
    known = dict(checksums or {})
    for file in sorted(written.iterdir()):
        flush(file)
        size = file.stat().st_size
        if file.name not in known:
            known[file.name] = checksum_file(file)
        if known[file.name].num_bytes != size:
            raise CheckpointError(f"{file.name} has {size} bytes, {known[file.name].num_bytes} were written: it is not "
                                  "whole, and the checkpoint is not made")
    content = {
        "format_version": FORMAT_VERSION, "progress": dataclasses.asdict(progress), "precision": precision,
        "contents": contents, "run_id": run_id, "world_size": world_size, "versions": versions, "run": run,
        "files": {name: known[name].num_bytes for name in sorted(known)},
        "checksums": {name: known[name].as_dict() for name in sorted(known)}}
    replace_text(written / MANIFEST, signed_text(content), is_durable=True)
    flush(written)
    final = iteration_path(directory, progress.iteration)
    if final.exists():
        os.rename(final, final.with_name(final.name + _REPLACED))
    os.rename(written, final)
    flush(folder)
    replace_text(folder / TRACKER, f"{progress.iteration}\n", is_durable=True)
    flush(folder)
    replaced = final.with_name(final.name + _REPLACED)
    if replaced.exists():
        shutil.rmtree(replaced)
    return final


def record_guards(directory: str | Path, iteration: int, guards: dict[str, Any]) -> None:
    """Replace, in the manifest of a checkpoint, what it says of the guards; its tensors are not touched.

    Args:
        directory: Folder of the run's checkpoints.
        iteration: Optimizer steps of a complete checkpoint.
        guards: State of the guards, as `RunProgress` has it.

    Raises:
        OSError: the manifest cannot be written; it is as it was.
        CheckpointError: the manifest cannot be read.
    """
    path = read_manifest(directory, iteration).path
    content = read_json(path / MANIFEST)
    content["progress"]["guards"] = guards
    replace_text(path / MANIFEST, signed_text(content), is_durable=True)
    flush(path)


def remove_old(directory: str | Path, newest: int, keep_last: int) -> list[int]:
    """Remove all but the last `keep_last` checkpoints up to iteration `newest`, which always stays; 0 keeps all.

    Checkpoints of later iterations, left by a run that was wound back, are not touched.

    Returns:
        The iterations removed.
    """
    if keep_last <= 0:
        return []
    removed = [iteration for iteration in saved_iterations(directory) if iteration <= newest][:-keep_last]
    for iteration in removed:
        path = iteration_path(directory, iteration)
        leaving = path.with_name(path.name + _REMOVING)
        os.rename(path, leaving)
        shutil.rmtree(leaving)
    return removed


def saving_path(directory: str | Path, iteration: int) -> Path:
    """Folder in which the checkpoint of `iteration` is written before `finish_save` gives it its name."""
    path = iteration_path(directory, iteration)
    return path.with_name(path.name + _SAVING)


def _find(directory: str | Path, iteration: int) -> Path | None:
    """Folder of a checkpoint, even if a crash stopped its replacement half-way."""
    path = iteration_path(directory, iteration)
    for candidate in (path, path.with_name(path.name + _REPLACED)):
        if candidate.is_dir():
            return candidate
    return None


def _parse_manifest(path: Path) -> Manifest:
    content = read_signed((path / MANIFEST).read_text(encoding="utf-8"), newest_version=FORMAT_VERSION)
    checksums = content.get("checksums")
    return Manifest(path, RunProgress(**content["progress"]), content["run"], content["versions"],
                    content["world_size"], content["precision"], content["files"],
                    content.get("contents", TRAINING), content.get("run_id"),
                    None if checksums is None else {name: read_checksums(own) for name, own in checksums.items()})


def _is_complete(directory: str | Path, iteration: int) -> bool:
    path = _find(directory, iteration)
    if path is None:
        return False
    try:
        manifest = _parse_manifest(path)
        require_files(path, manifest.files, manifest.checksums)
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return True


def _choices(directory: str | Path, verb: str, where: str, before: int | None = None) -> str:
    """The way out as the end of a message: the newest complete checkpoint, if there is one."""
    for iteration in reversed(saved_iterations(directory)):
        if (before is None or iteration < before) and _is_complete(directory, iteration):
            return f"; {verb} {iteration} {where} (the newest complete checkpoint there)"
    return "; there is no other complete checkpoint there" if before is not None else ""
