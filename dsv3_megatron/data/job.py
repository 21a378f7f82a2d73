"""The folder in which a preprocessing job works: who owns it, what it is making, how far it has come.

OUTPUT.unfinished/ holds a lock (one process at a time), job.json (what determines the output: inputs, tokenizer,
options), state.json (the last position that everything on disk agrees with, replaced after every block; it has a
checksum of itself and the hashes of the rest) and the growing datasets. A job that ends, however it ends, leaves either
the finished datasets or this folder, from which the same job goes on.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from typing import IO, Any

from dsv3_megatron.config.json_files import read_json_object
from dsv3_megatron.config.new_files import replace_text, require_own_folder
from dsv3_megatron.config.output import json_text
from dsv3_megatron.data.signed_json import with_signature, without_signature

FOLDER_SUFFIX = ".unfinished"
_SIGNATURE = "signature"


def job_hash(identity: dict[str, Any]) -> str:
    """A hash of what determines a job's output, the same for all shards of it and on machines with copies of its input.

    Of an input's place and time only the name and the size go into it.
    """
    inputs = [
        {key: os.path.basename(value) if key == "path" else value for key, value in file.items() if key != "mtime_ns"}
        for file in identity["inputs"]
    ]
    whole = {key: value for key, value in identity.items() if key != "shard"} | {"inputs": inputs}
    return hashlib.sha256(json_text(whole, sort_keys=True).encode("utf-8")).hexdigest()[:16]


class Job:
    """An open job folder.

    Args:
        path: The folder; its parent is created if missing.
        identity: What determines the output, as JSON values; a job is gone on with only if all of it is the same.
        is_resumed: Go on with what is there.
        is_overwrite_allowed: Drop what is there.

    Raises:
        ValueError: another process works in the folder, it holds another job, its state is damaged, or it holds work
            that was neither to be gone on with nor to be dropped.
    """

    def __init__(self, path: str, identity: dict[str, Any], *, is_resumed: bool, is_overwrite_allowed: bool) -> None:
        self.path = path
        self._identity = json.loads(json_text(identity))
        os.makedirs(path, exist_ok=True)
        require_own_folder(path)
        self._lock = self._take_lock()
        try:
            self.state = self._read_state(is_resumed, is_overwrite_allowed)
            if self.state is None:
                self._clear()
                self._replace("job.json", self._identity)
        except BaseException:
            self._lock.close()
            raise

    def save(self, state: dict[str, Any]) -> None:
        """Record how far the job has come; what it speaks of must have been written."""
        self._replace("state.json", with_signature(state, _SIGNATURE))
        self.state = state

    def close(self) -> None:
        """Leave the folder as it is, for a later run; one in which nothing was finished is removed."""
        if self.state is None:
            self.remove()
        else:
            self._lock.close()

    def remove(self) -> None:
        """The job is done."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()

    def _take_lock(self) -> IO[str]:
        lock = open(os.path.join(self.path, "lock"), "w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise ValueError(
                f"another process is at work in {self.path}: wait for it, or give another --output-prefix"
            ) from None
        return lock

    def _read_state(self, is_resumed: bool, is_overwrite_allowed: bool) -> dict[str, Any] | None:
        if is_overwrite_allowed and not is_resumed:
            return None
        try:
            state = self._read("state.json")
            state = None if state is None else without_signature(state, _SIGNATURE)
        except ValueError as error:
            raise ValueError(f"{os.path.join(self.path, 'state.json')} does not say how far the unfinished work of an "
                             f"earlier run came ({error}): start over with --overwrite (without --resume)") from error
        if state is None:
            return None
        if not is_resumed:
            raise ValueError(
                f"{self.path} holds the unfinished work of an earlier run: pass --resume to go on from there, or "
                "--overwrite to start over"
            )
        try:
            before = self._read("job.json") or {}
        except ValueError:
            before = {}  # then everything differs
        changed = sorted(key for key in {*before, *self._identity} if before.get(key) != self._identity.get(key))
        if changed:
            raise ValueError(
                f"{self.path} holds the unfinished work of another job, it differs in: {', '.join(changed)}; give the "
                "same inputs and options to go on with it, or --overwrite (without --resume) to start over"
            )
        return state

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            return read_json_object(os.path.join(self.path, name))
        except FileNotFoundError:
            return None

    def _replace(self, name: str, content: dict[str, Any]) -> None:
        replace_text(os.path.join(self.path, name), json_text(content, indent=1))

    def _clear(self) -> None:
        for name in os.listdir(self.path):
            if name != "lock":
                os.unlink(os.path.join(self.path, name))
