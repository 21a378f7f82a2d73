"""Folders of a run: whose they are, and what a start may do in them. No torch.

    SAVE/run.json, LOGS/run.json     identity of the run whose checkpoints or logs are there
    SAVE/run.lock, LOGS/run.lock     the process that writes them now (lock.py)
    EXPORT.lock                      the same for a folder that a run will make at its end

A run has an identity from its first start on; it is in each of its checkpoints too. A start that does not go on from a
folder's checkpoints may not write into it, nor empty the logs of another run: it is refused before anything is touched.
One that goes on (`load`, or `resume="auto"`) keeps the identity, and with it the logs.
"""

from __future__ import annotations

import atexit
import dataclasses
import logging
import os
import shutil
import threading
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dsv3_megatron.checkpoint.folder import (
    TRACKER,
    WEIGHTS,
    CheckpointError,
    Manifest,
    latest_iteration,
    read_sound_manifest,
    saved_iterations,
)
from dsv3_megatron.config.json_files import read_json
from dsv3_megatron.config.new_files import replace_text
from dsv3_megatron.config.output import json_text
from dsv3_megatron.config.training import CheckpointConfig
from dsv3_megatron.guards.endings import ENDED_FILE, forget_ended
from dsv3_megatron.guards.events import GUARDS_FILE, REPORT_FILE
from dsv3_megatron.guards.lock import BEAT_S, STALE_S, RunLock
from dsv3_megatron.metrics.event_files import EVENT_FILES
from dsv3_megatron.metrics.run_records import CONFIG_FILE, ENVIRONMENT_FILE, METRICS_FILE

IDENTITY_FILE, LOCK_FILE, EXPORT_LOCK_SUFFIX = "run.json", "run.lock", ".lock"
# What other programs' checkpoints look like: a folder with such files is not an empty one.
_FOREIGN = ("*.safetensors", "*.safetensors.index.json", "*.distcp", "*.pt", "*.pth", "*.ckpt", "pytorch_model*",
            ".metadata", "checkpoint.json", "release", "checkpoint-*", "global_step*")
_OVERWRITE = "remove what is there with --overwrite-run"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """What a run starts from, and as which run.

    Attributes:
        load: Folder of the checkpoint to go on from; None: a fresh run.
        run: Identity of the run.
        notes: What is to be said of it.
        removed: Files and folders of other runs that are to be removed first.
        iteration: Step of the checkpoint to go on from; None: a fresh run.
    """

    load: str | None
    run: str
    notes: tuple[str, ...] = ()
    removed: tuple[Path, ...] = ()
    iteration: int | None = None


def new_identity() -> str:
    """An identity for a run that begins."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:8]}"


def plan_start(config: CheckpointConfig, logs: str | None, new: str) -> Start:
    """Decide what a run starts from, and that its folders are its own; reads, and changes nothing.

    Args:
        config: The run's checkpoint configuration: where checkpoints are loaded from and saved to.
        logs: Folder for logs; None: there are none.
        new: Identity of the run if it is a new one.

    Raises:
        CheckpointError: `load` has no checkpoint and that is an error, or one that cannot be used; or a folder holds
            another run's checkpoints or logs; with the ways out.
    """
    config, notes = _with_source(config)
    load = _find_load(config)
    if config.load and load is None:
        notes.append(f"load={config.load} has no checkpoint: a fresh run starts (--exit-on-missing-checkpoint ends "
                     "instead)")
    manifest = None
    if load:
        manifest, passed = read_sound_manifest(load)
        notes += passed
    run = _known_identity(config, manifest) or new
    removed = [*_others_in_save(config, load, manifest, run), *_others_in_logs(config, logs, load, run)]
    return Start(load, run, tuple(notes), tuple(removed), manifest.progress.iteration if manifest else None)


def identity_of(folder: str | Path) -> str | None:
    """Identity of the run that a folder of checkpoints or logs says it is of; None if it does not say."""
    content = _read_json(Path(folder) / IDENTITY_FILE)
    return content.get("run") if content else None


class RunClaim:
    """The folders of a run, held by the process that writes them: its rank 0 takes them, the others ask it.

    Args:
        config: The run's checkpoint configuration: where checkpoints are saved, loaded and exported to.
        logs: Folder for logs; None: there are none.
        stale_s: Seconds without a sign of life after which another machine's lock is stale.
    """

    def __init__(self, config: CheckpointConfig, logs: str | None, *, stale_s: float = STALE_S) -> None:
        self._config, self._logs, self._stale_s, self._new = config, logs, stale_s, new_identity()
        self._locks: list[RunLock] = []
        self._stopped = threading.Event()
        self._start: Start | None = None

    def look(self) -> Start:
        """What the run would start from; changes nothing.

        Raises:
            CheckpointError: the run may not start, or a process on this machine holds one of its folders.
        """
        start = plan_start(self._config, self._logs, self._new)
        for lock in self._wanted(start.run):
            lock.refuse_if_held()
        return start

    def take(self) -> Start:
        """Take the run's folders; `settle` has them say whose they are.

        Returns:
            What the run starts from, decided while nobody else could change it.

        Raises:
            CheckpointError: the run may not start, or another process holds one of its folders.
        """
        self.look()
        atexit.register(self.release)
        try:
            notes = self._take_locks()
            start = plan_start(self._config, self._logs, self._new)
        except BaseException:
            self.release()
            raise
        for note in (*notes, *start.notes):
            logger.warning("%s", note)
        self._start = start
        threading.Thread(target=self._beat, name="run-lock", daemon=True).start()
        return start

    def settle(self) -> None:
        """Remove what other runs left in the folders that were taken, where that is asked for, and mark them as this
        run's. Called when nothing else keeps the run from starting; of a process that took none, nothing happens.

        Raises:
            OSError: a folder cannot be written.
        """
        if self._start is None:
            return
        removed = self._start.removed
        for path in removed:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        if removed:
            logger.warning("removed what another run left (--overwrite-run): %s", ", ".join(map(str, removed)))
        for folder in self._folders():
            if identity_of(folder) != self._start.run:
                _write_identity(folder, self._start.run, self._config.save)
        if self._config.save:
            forget_ended(self._config.save)

    def check(self) -> None:
        """Make sure that the folders are still this process's; one that was emptied says again whose it is.

        Raises:
            CheckpointError: another process has taken one over.
        """
        for lock in self._locks:
            try:
                lock.check()
            except OSError as error:  # gone, or full: nobody else takes it now, and who writes there says so
                logger.debug("%s cannot be looked at: %s", lock.path, error)
        start = self._start
        if start is None:
            return
        for folder in self._folders():
            if Path(folder).is_dir() and not (Path(folder) / IDENTITY_FILE).exists():
                try:
                    _write_identity(folder, start.run, self._config.save)
                except OSError as error:
                    logger.debug("%s does not say whose it is: %s", folder, error)

    def release(self) -> None:
        """Let other processes have the folders; may be called twice."""
        self._stopped.set()
        atexit.unregister(self.release)
        while self._locks:
            self._locks.pop().release()

    close = release

    # ---- parts ---------------------------------------------------------------------------------------

    def _folders(self) -> list[str]:
        """The run's own folders, each once."""
        given = [folder for folder in (self._config.save, self._logs) if folder]
        return [folder for number, folder in enumerate(given)
                if not any(_is_same(folder, other) for other in given[:number])]

    def _wanted(self, run: str) -> list[RunLock]:
        locks = []
        for name, folder in (("save", self._config.save), ("tensorboard_dir", self._logs)):
            if folder in self._folders():
                locks.append(RunLock(Path(str(folder)) / LOCK_FILE, run, f"{name}={folder}", stale_s=self._stale_s))
        export = self._config.export_hf
        if export:
            path = Path(os.path.abspath(export))
            locks.append(RunLock(path.with_name(path.name + EXPORT_LOCK_SUFFIX), run, f"export_hf={export}",
                                 stale_s=self._stale_s))
        return locks

    def _take_locks(self) -> list[str]:
        notes = []
        # Whose run it is may only be known once the folders are held; a lock needs a name before.
        for lock in self._wanted(plan_start(self._config, self._logs, self._new).run):
            lock.path.parent.mkdir(parents=True, exist_ok=True)
            note = lock.take()
            self._locks.append(lock)
            notes += [note] if note else []
        return notes

    def _beat(self) -> None:
        while not self._stopped.wait(min(BEAT_S, self._stale_s / 4)):
            for lock in tuple(self._locks):
                lock.touch()


# ---- whose is it? ----


def _with_source(config: CheckpointConfig) -> tuple[CheckpointConfig, list[str]]:
    """The configuration whose `load` is what the start goes on from by `resume`, and what is to be said of that."""
    save = config.save
    if config.resume != "auto" or not save:
        return config, []
    if config.load is None:
        return dataclasses.replace(config, load=save), []
    if _is_same(config.load, save) or not saved_iterations(save):
        return config, []
    return dataclasses.replace(config, load=save), [
        f"resume=auto: the run goes on from save={save}, which has checkpoints; load={config.load} was for its first "
        "start"]


def _find_load(config: CheckpointConfig) -> str | None:
    """The folder to go on from, if there is anything in it to go on from.

    Raises:
        CheckpointError: there is none and that is an error, or what is there is no run's checkpoint.
    """
    if not config.load:
        return None
    folder = Path(config.load)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"load={config.load} is not a folder; give the folder of a run's checkpoints")
    if latest_iteration(folder) is not None or saved_iterations(folder):
        return config.load
    foreign = sorted({path.name for pattern in _FOREIGN for path in folder.glob(pattern)})
    if foreign:
        way_out = f"give the folder above it, {folder.parent}" if "checkpoint.json" in foreign else \
            "convert it first (dsv3 convert hf-to-megatron)"
        raise CheckpointError(f"load={config.load} has no checkpoint of a run: no {TRACKER} in it, but "
                              f"{', '.join(foreign[:3])}; {way_out}, or give another folder")
    if config.exit_on_missing_checkpoint:
        raise CheckpointError(f"load={config.load} has no checkpoint: no {TRACKER} in it; leave out "
                              "--exit-on-missing-checkpoint to start a fresh run, or give another folder")
    return None


def _known_identity(config: CheckpointConfig, manifest: Manifest | None) -> str | None:
    """Identity of the run that goes on; None for one that begins."""
    if manifest is not None and manifest.contents != WEIGHTS and manifest.run_id:
        return manifest.run_id
    if not config.load:
        return None
    # One that ended before its first checkpoint, or an older version's.
    known = identity_of(config.load)
    if known is None and config.save and not saved_iterations(config.save):
        known = identity_of(config.save)
    return known


def _others_in_save(config: CheckpointConfig, load: str | None, manifest: Manifest | None, run: str) -> list[Path]:
    """Another run's checkpoints where this one's are to go, which are to be removed.

    Raises:
        CheckpointError: there are some, and they are not to be.
    """
    save = config.save
    if not save or (load and _is_same(load, save)):
        return []
    iterations = saved_iterations(save)
    tracker = Path(save) / TRACKER
    if not iterations and not tracker.exists():
        return []
    if load and manifest is not None and identity_of(save) == run \
            and max(iterations, default=0) <= manifest.progress.iteration:
        return []  # the same run, come further in a folder beside it
    if config.overwrite_run:
        return [tracker, *(path for path in Path(save).glob("iter_*") if path.is_dir()), Path(save) / ENDED_FILE]
    newest = f", the newest of iteration {iterations[-1]}" if iterations else ""
    why = f"load={load} is another folder" if load else (
        f"load={config.load} has no checkpoint" if config.load else "load is not set")
    raise CheckpointError(
        f"save={save} holds {len(iterations)} checkpoint(s){newest}, of {_whose(save)}, and {why}: this run's would "
        f"replace them and have them removed. Go on from them with --load {save}, choose another folder, or "
        f"{_OVERWRITE}")


def _others_in_logs(config: CheckpointConfig, logs: str | None, load: str | None, run: str) -> list[Path]:
    """Another run's logs where this one's are to go, which are to be removed.

    Raises:
        CheckpointError: there are some, and they are not to be.
    """
    if not logs:
        return []
    files = _log_files(logs)
    if not files:
        return []
    owner = identity_of(logs)
    if config.load and (owner == run if owner else _wrote_to(logs, load)):
        return []
    if config.overwrite_run:
        beside = (REPORT_FILE, CONFIG_FILE, ENVIRONMENT_FILE, METRICS_FILE, GUARDS_FILE)
        return [*(Path(logs) / name for name in beside), *Path(logs).glob(EVENT_FILES)]
    theirs = (_read_json(Path(logs) / IDENTITY_FILE) or {}).get("save") or "the folder of its checkpoints"
    raise CheckpointError(
        f"tensorboard_dir={logs} holds the logs ({', '.join(sorted({file.name for file in files})[:3])}) of "
        f"{_whose(logs)}, not of this one: they would be emptied or mixed with this run's. Choose another folder, go "
        f"on as that run with --load {theirs}, or {_OVERWRITE}")


def _log_files(logs: str) -> list[Path]:
    """Files with something that a run logged; event files that go with an empty metrics.jsonl hold nothing."""
    folder = Path(logs)
    texts = [folder / name for name in (METRICS_FILE, GUARDS_FILE)]
    files = [file for file in texts if file.is_file() and file.stat().st_size]
    return files if files or texts[0].is_file() else list(folder.glob(EVENT_FILES))


def _wrote_to(logs: str, load: str | None) -> bool:
    """Whether logs without an identity, of an older version, are of the run whose checkpoints are loaded."""
    content = _read_json(Path(logs) / CONFIG_FILE)
    save = content.get("checkpoint", {}).get("save") if content else None
    return bool(load and save and _is_same(load, save))


def _whose(folder: str) -> str:
    owner = identity_of(folder)
    return f"run {owner}" if owner else "another run"


def _is_same(one: str, other: str) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _read_json(file: Path) -> dict[str, Any] | None:
    try:
        content = read_json(file)
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _write_identity(folder: str, run: str, save: str | None) -> None:
    content = {"run": run, "begun": datetime.now(UTC).isoformat(timespec="seconds"),
               "save": os.path.abspath(save) if save else None}
    replace_text(Path(folder) / IDENTITY_FILE, json_text(content) + "\n", is_shared=True)
