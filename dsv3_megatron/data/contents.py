"""What a dataset's files hold: their hashes and their lowest and highest id, found out once.

A sidecar (PREFIX.json) says it, if it is of these files: its counts and its hash of the index must be theirs. Tokens
are proved by PREFIX.sums when they are read (proved_tokens.py). Where they are newer than the sidecar, and below 4 GB
or without PREFIX.sums, its hash of them must be theirs too. A dataset without a sidecar is read through once, whatever
its size. What was found by reading is kept in PREFIX.checked.json beside the data (or in a folder for such files, or in
the system's temporary one, whichever can be written to first), for as long as sizes, times and ends of the index stay.

Every offset, length and document of the index is checked then too: what leads out of the tokens is refused.

No torch here. Several processes of a machine that ask at the same time wait for the one that reads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsv3_megatron.config.json_files import read_json_object
from dsv3_megatron.config.new_files import replace_text, require_own_folder
from dsv3_megatron.config.output import json_text
from dsv3_megatron.data.checksums import RunningChecksum, is_known
from dsv3_megatron.data.indexed import (
    IndexHeader,
    Sidecar,
    check_index,
    dataset_paths,
    read_chunks,
    read_header,
    read_sidecar,
)
from dsv3_megatron.data.signed_json import with_signature, without_signature

logger = logging.getLogger(__name__)

_VERSION = 3  # of what is kept: 2 since the whole index is checked, 3 since it is signed
_SIGNATURE = "signature"
_END_BYTES = 1 << 16
_PRIVATE = 0o700
# Reading less than this takes no time worth a file; and no time worth a word.
_KEPT_FROM_BYTES = 64 << 20
_SAID_FROM_BYTES = 4 << 30


@dataclass(frozen=True)
class Contents:
    """The hashes, ids and counts of a dataset's files.

    Attributes:
        idx_sha256: Hash of the whole index file, in hexadecimal.
        bin_sha256: Hash of all the tokens' bytes, in hexadecimal.
        bin_bytes: Size of the tokens.
        lowest_id: Lowest token id if it is negative, else 0.
        highest_id: Highest token id; -1 for a dataset without tokens.
        num_sequences: Sequences in the index.
    """

    idx_sha256: str
    bin_sha256: str
    bin_bytes: int
    lowest_id: int
    highest_id: int
    num_sequences: int


def read_contents(prefix: str, *, cache_dir: str | None = None) -> Contents:
    """What a dataset's files hold, from its sidecar, from what was found before, or by reading them.

    Args:
        prefix: Path of PREFIX.bin and PREFIX.idx, without suffix.
        cache_dir: Folder for what is found; None: beside the data.

    Raises:
        ValueError: a file is missing or damaged, holds no integers, or the sidecar is of other files.
    """
    header = read_header(prefix)
    if header.dtype.kind not in "iu":
        raise ValueError(f"{prefix}.idx says that the tokens are {header.dtype.name}; ids must be integers: make the "
                         "dataset again")
    sidecar = read_sidecar(prefix)
    if sidecar is not None:
        _check_counts(prefix, header, sidecar)
    key, places = _key_of(prefix), _places(prefix, cache_dir)
    found = _find(places, key)
    if found is None:
        with _lock(prefix):
            found = _find(places, key)  # by the process that was waited for
            if found is None:
                found, num_bytes = _read(prefix, header, sidecar)
                if sidecar is None or num_bytes >= _KEPT_FROM_BYTES:
                    _keep(places, key, found)
    if sidecar is not None:
        for name, actual in (("idx", found.idx_sha256), ("bin", found.bin_sha256)):
            if getattr(sidecar, f"{name}_sha256") != actual:
                raise ValueError(_stale(prefix, f"the hash of the .{name} file is another"))
    return found


def require_index(prefix: str) -> None:
    """Check a dataset's index in whole, and against its sidecar where it has one; reads no tokens.

    Raises:
        ValueError: a file is missing or damaged, or the sidecar is of other files.
    """
    header, sidecar = read_header(prefix), read_sidecar(prefix)
    if sidecar is None:
        check_index(prefix)
        return
    _check_counts(prefix, header, sidecar)
    if _index_sha256(prefix, sidecar) != sidecar.idx_sha256:
        raise ValueError(_stale(prefix, "the hash of the .idx file is another"))


def _index_sha256(prefix: str, sidecar: Sidecar | None) -> str:
    """The hash of an index, all of whose numbers are right; the sidecar's where the index has its checksum."""
    check_index(prefix)
    algorithm = "" if sidecar is None else sidecar.idx_checksum.partition(":")[0]
    found: Any = RunningChecksum(algorithm) if is_known(algorithm) else hashlib.sha256()
    for chunk in read_chunks(dataset_paths(prefix)[1]):
        found.update(chunk)
    if isinstance(found, RunningChecksum):
        assert sidecar is not None
        if found.text() != sidecar.idx_checksum:
            raise ValueError(_stale(prefix, "the hash of the .idx file is another"))
        return sidecar.idx_sha256
    return found.hexdigest()


def _check_counts(prefix: str, header: IndexHeader, sidecar: Sidecar) -> None:
    """The cheap part: what the header of the index says."""
    for name, said, actual in (("dtype", sidecar.dtype, header.dtype.name),
                               ("num_tokens", sidecar.num_tokens, header.num_tokens),
                               ("num_sequences", sidecar.num_sequences, header.num_sequences),
                               ("num_documents", sidecar.num_documents, header.num_documents)):
        if said != actual:
            raise ValueError(_stale(prefix, f"{name} is {said} in it and {actual} in the index"))


def _stale(prefix: str, why: str) -> str:
    return (f"{prefix}.json is the sidecar of other files than {prefix}.bin and .idx ({why}): bring the three files of "
            "one dataset together, or remove the sidecar if the other two are right")


def _read(prefix: str, header: IndexHeader, sidecar: Sidecar | None) -> tuple[Contents, int]:
    """What the files hold, and how many bytes had to be read for it."""
    bin_path, idx_path, json_path = dataset_paths(prefix)
    bin_bytes, idx_bytes = os.path.getsize(bin_path), os.path.getsize(idx_path)
    # Many tokens with checksums are not waited for: they are proved when they are read.
    is_trusted = sidecar is not None and (
        os.stat(bin_path).st_mtime_ns <= os.stat(json_path).st_mtime_ns
        or (bool(sidecar.sums_algorithm) and bin_bytes >= _SAID_FROM_BYTES))
    num_bytes = idx_bytes + (0 if is_trusted else bin_bytes)
    if num_bytes >= _SAID_FROM_BYTES:
        why = "it has no sidecar" if sidecar is None else "its tokens are newer than its sidecar"
        logger.warning("%s: reading %.1f GB once to check ids and hashes, for %s", prefix, num_bytes / 1e9, why)
    idx_sha256 = _index_sha256(prefix, sidecar)
    if is_trusted:
        assert sidecar is not None
        bin_sha256, lowest, highest = sidecar.bin_sha256, 0, sidecar.max_token_id
    else:
        bin_sha256, lowest, highest = _read_tokens(bin_path, header.dtype)
    return Contents(idx_sha256, bin_sha256, bin_bytes, lowest, highest, header.num_sequences), num_bytes


def _read_tokens(path: str, dtype: np.dtype) -> tuple[str, int, int]:
    """Hash, lowest and highest id of a .bin file, as `Contents` has them."""
    digest, lowest, highest = hashlib.sha256(), 0, -1
    for chunk in read_chunks(path):
        digest.update(chunk)
        ids = np.frombuffer(chunk, dtype=dtype)
        lowest, highest = min(lowest, int(ids.min())), max(highest, int(ids.max()))
    return digest.hexdigest(), lowest, highest


# ---- what was found, kept ----


def _key_of(prefix: str) -> dict[str, Any]:
    """What tells these files from others of their name; reads the ends of the index."""
    bin_path, idx_path, json_path = dataset_paths(prefix)
    with open(idx_path, "rb") as stream:
        ends = stream.read(_END_BYTES)
        stream.seek(max(0, os.path.getsize(idx_path) - _END_BYTES))
        ends += stream.read()
    stats = {path[-3:]: os.stat(path) for path in (bin_path, idx_path)}
    if os.path.isfile(json_path):
        stats["json"] = os.stat(json_path)
    return {"version": _VERSION, "index": hashlib.sha256(ends).hexdigest(),
            **{name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}}


def _places(prefix: str, cache_dir: str | None) -> list[str]:
    """Files that may hold what was found, the first choice first."""
    path = os.path.realpath(prefix)
    name = f"{os.path.basename(path)}.{hashlib.sha256(path.encode(errors='surrogateescape')).hexdigest()[:16]}"
    first = os.path.join(cache_dir, f"{name}.checked.json") if cache_dir else f"{prefix}.checked.json"
    temporary = _temporary_folder()
    return [first] if temporary is None else [first, os.path.join(temporary, f"{name}.checked.json")]


def _temporary_folder() -> str | None:
    """This user's folder in the system's temporary one, made where it is not there; None where it is somebody else's.

    Whoever made the folder first could otherwise say what our data hold.
    """
    path = os.path.join(tempfile.gettempdir(), f"dsv3_megatron-{os.geteuid()}")
    try:
        os.makedirs(path, mode=_PRIVATE, exist_ok=True)
        require_own_folder(path)
        os.chmod(path, _PRIVATE)
    except (OSError, ValueError) as error:
        logger.warning("%s is not used: %s", path, error)
        return None
    return path


def _find(places: list[str], key: dict[str, Any]) -> Contents | None:
    """What a file that is of these data holds; a file that cannot be read counts as none: it is made again."""
    for place in places:
        try:
            kept = without_signature(read_json_object(place), _SIGNATURE)
            if kept["key"] == key:
                return Contents(**kept["contents"])
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s cannot be used (%s): the data are read again", place, error)
    return None


def _keep(places: list[str], key: dict[str, Any], found: Contents) -> None:
    """Write what was found where it can be written; whole or not at all."""
    kept = with_signature({"key": key, "contents": dataclasses.asdict(found)}, _SIGNATURE)
    text = json_text(kept, indent=2) + "\n"
    reasons = []
    for place in places:
        try:
            os.makedirs(os.path.dirname(place) or ".", exist_ok=True)
            replace_text(place, text, is_shared=True)
            return
        except OSError as error:
            reasons.append(str(error))
    logger.warning("what was found about the data cannot be kept, and will be read again (%s)", "; ".join(reasons))


@contextlib.contextmanager
def _lock(prefix: str) -> Iterator[None]:
    """Let one process of this machine read a dataset at a time; without a place for the lock, each reads for itself."""
    name = hashlib.sha256(os.path.realpath(prefix).encode(errors="surrogateescape")).hexdigest()[:16]
    folder = _temporary_folder()
    try:
        if folder is None:
            raise OSError("there is no folder for it")
        stream = open(os.path.join(folder, f"{name}.lock"), "a", encoding="utf-8")
    except OSError as error:
        logger.warning("%s: no lock (%s), so each process reads for itself", prefix, error)
        yield
        return
    with stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
