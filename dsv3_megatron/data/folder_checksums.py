"""`checksums.json`: the checksums of the files of a folder that others read too, such as a tokenizer or an export.

Hugging Face's formats have no place for checksums, so they stand in a file beside the others. A folder without one is
read as far as its format can be checked. Whoever changes a file of the folder on purpose removes checksums.json.
Another program that saves into the folder does not know of it: a refusal says therefore which files are others now.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dsv3_megatron.config.json_files import is_plain_name, read_json_object
from dsv3_megatron.config.new_files import replace_text
from dsv3_megatron.config.output import json_text
from dsv3_megatron.data.checksums import DamagedFileError, FileChecksums, checksum_file, prove_file, read_checksums
from dsv3_megatron.data.signed_json import with_signature, without_signature

CHECKSUMS = "checksums.json"
# Of larger files a refusal compares the size alone, when it looks for what else is another.
_COMPARED_BYTES = 64 << 20
_NAMED = 5
_SIGNATURE, _VERSION = "signature", 1


def write_folder_checksums(folder: str | os.PathLike[str], *, names: Iterable[str] | None = None,
                           known: Mapping[str, FileChecksums] | None = None) -> None:
    """Write the checksums of files of a folder, at its top, into `checksums.json` there.

    Args:
        folder: The folder.
        names: Names of the files; None: all.
        known: Checksums that were made while files were written, by name; the other files are read for theirs.

    Raises:
        OSError: a file cannot be read, or the checksums cannot be written.
    """
    folder = Path(folder)
    if names is None:
        names = [file.name for file in folder.iterdir() if file.is_file() and file.name != CHECKSUMS]
    made = known or {}
    files = {name: (made.get(name) or checksum_file(folder / name)).as_dict() for name in sorted(names)}
    replace_text(folder / CHECKSUMS, json_text(with_signature({"version": _VERSION, "files": files}, _SIGNATURE),
                                               indent=1) + "\n", is_shared=True)


def read_folder_checksums(folder: str | os.PathLike[str]) -> dict[str, FileChecksums]:
    """The checksums of a folder's files by name; none where it has no `checksums.json`.

    Raises:
        ValueError: the file is damaged, or of a newer version.
    """
    file = Path(folder) / CHECKSUMS
    try:
        content = read_json_object(file)
        version = content.get("version")
        if version != _VERSION:
            raise ValueError(f"version {version!r}, this release reads {_VERSION}")
        files = without_signature(content, _SIGNATURE)["files"]
        for name in files:
            if not is_plain_name(name):
                raise ValueError(f"it names a file {name!r}, which is not a file of this folder")
        return {name: read_checksums(_object(entry)) for name, entry in files.items()}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} does not hold checksums of this folder's files: {error}; remove it if the files are "
                         "right") from error


def require_whole(file: str | os.PathLike[str], others: Iterable[str] = ()) -> None:
    """Prove a small file by the `checksums.json` beside it, if there is one that names it.

    Args:
        file: The file.
        others: Names of files that must be there if they are named.

    Raises:
        ValueError: the file does not have its checksum, or one of the others is gone.
    """
    path = Path(file)
    known = read_folder_checksums(path.parent)
    for name in (*(name for name in others if name in known and not (path.parent / name).is_file()), path.name):
        if name in known:
            _prove(path.parent / name, known)


def require_all_whole(folder: str | os.PathLike[str], known: Mapping[str, FileChecksums]) -> None:
    """Prove files of a folder, each of which must be there.

    Args:
        folder: The folder.
        known: Checksums of the files by name, from `read_folder_checksums`.

    Raises:
        ValueError: a file is gone, or does not have its checksum.
    """
    for name in sorted(known):
        _prove(Path(folder) / name, known)


def refusal(file: str | os.PathLike[str], reason: object) -> str:
    """Message about a file that is not the one of its checksums: what else differs in its folder, and the ways out.

    Args:
        file: The file, beside which there is a `checksums.json`.
        reason: What is wrong with it; names it.
    """
    folder = Path(file).parent
    try:
        found = {name: what for name, checksums in read_folder_checksums(folder).items()
                 if (what := _difference(folder / name, checksums))}
    except (ValueError, OSError):
        found = {}
    named = [f"{name} ({what})" for name, what in sorted(found.items())][:_NAMED]
    listed = "; ".join(named) + (f"; {len(found) - _NAMED} more" if len(found) > _NAMED else "")
    weights = "" if not any(name.endswith(".safetensors") for name in found) else \
        ", or give --verify-files none to read weights as they are"
    return (f"{reason}. Not as {folder / CHECKSUMS} has them: {listed or Path(file).name}. A program that saves into "
            "this folder, such as Transformers with save_pretrained, leaves that file as it was: if one did, or you "
            f"changed files on purpose, remove {CHECKSUMS}{weights}. Otherwise get the files again")


def _prove(path: Path, known: Mapping[str, FileChecksums]) -> None:
    checksums = known[path.name]
    if not path.is_file():
        raise ValueError(refusal(path, f"{path} is missing"))
    try:
        prove_file(path, checksums)
    except DamagedFileError as error:
        raise ValueError(refusal(path, error)) from error


def _difference(path: Path, checksums: FileChecksums) -> str:
    """What differs about a file, in words; nothing if it is the one of its checksums, as far as that is looked at."""
    if not path.is_file():
        return "missing"
    size = path.stat().st_size
    if size != checksums.num_bytes:
        return f"{size} bytes, not {checksums.num_bytes}"
    try:
        if size <= _COMPARED_BYTES:
            prove_file(path, checksums)
    except DamagedFileError:
        return "other content"
    return ""


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"an entry is a {type(value).__name__}")
    return value
