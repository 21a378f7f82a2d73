"""`checksums.json`: the checksums of the files of a folder that others read too, such as a tokenizer or an export.

Hugging Face's formats have no place for checksums, so they stand in a file beside the others. A folder without one is
read as far as its format can be checked. Whoever changes a file of the folder on purpose removes checksums.json.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dsv3_megatron.config.json_files import read_json_object
from dsv3_megatron.config.output import json_text
from dsv3_megatron.data.checksums import BlockVerifier, DamagedFileError, FileChecksums, checksum_file, read_checksums
from dsv3_megatron.data.signed_json import with_signature, without_signature

CHECKSUMS = "checksums.json"
_SIGNATURE, _VERSION = "signature", 1


def write_folder_checksums(folder: str | os.PathLike[str], *, names: Iterable[str] | None = None) -> None:
    """Write the checksums of files of a folder, at its top, into `checksums.json` there.

    Args:
        folder: The folder.
        names: Names of the files; None: all.

    Raises:
        OSError: a file cannot be read, or the checksums cannot be written.
    """
    folder = Path(folder)
    if names is None:
        names = [file.name for file in folder.iterdir() if file.is_file() and file.name != CHECKSUMS]
    files = {name: checksum_file(folder / name).as_dict() for name in sorted(names)}
    partial = folder / f"{CHECKSUMS}.tmp-{os.getpid()}"
    partial.write_text(json_text(with_signature({"version": _VERSION, "files": files}, _SIGNATURE), indent=1) + "\n",
                       encoding="utf-8")
    os.replace(partial, folder / CHECKSUMS)


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
        return {str(name): read_checksums(_object(entry)) for name, entry in files.items()}
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
    for name in others:
        if name in known:
            _require_there(path.parent / name)
    if path.name in known:
        _prove(path, known[path.name])


def require_all_whole(folder: str | os.PathLike[str], known: Mapping[str, FileChecksums]) -> None:
    """Prove files of a folder, each of which must be there.

    Args:
        folder: The folder.
        known: Checksums of the files by name, from `read_folder_checksums`.

    Raises:
        ValueError: a file is gone, or does not have its checksum.
    """
    for name in sorted(known):
        _require_there(Path(folder) / name)
        _prove(Path(folder) / name, known[name])


def _require_there(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"{path} is missing, {path.parent / CHECKSUMS} has its checksum: get it again, or remove "
                         f"{CHECKSUMS} if it is not needed")


def _prove(path: Path, checksums: FileChecksums) -> None:
    size = path.stat().st_size
    try:
        if size != checksums.num_bytes:
            raise DamagedFileError(str(path), min(size, checksums.num_bytes),
                                   f"it has {size} bytes, {checksums.num_bytes} were written")
        BlockVerifier(path, checksums).require(0, size)
    except DamagedFileError as error:
        raise ValueError(f"{error}; get it again, or, if it was changed on purpose, remove {path.parent / CHECKSUMS}"
                         ) from error


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"an entry is a {type(value).__name__}")
    return value
