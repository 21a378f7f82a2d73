"""A checkpoint's manifest as a file: signed with a checksum of its content, and held against the files it names.

No torch. `folder.py` says what is in a manifest.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsv3_megatron.config.json_files import is_plain_name, parse_json
from dsv3_megatron.config.output import json_text
from dsv3_megatron.data.checksums import DamagedFileError, FileChecksums, prove_file
from dsv3_megatron.data.signed_json import with_signature, without_signature

# Field of a manifest with the checksum of all the others: "ALGORITHM:DIGITS".
SIGNATURE = "manifest_checksum"
# The first version whose manifests are signed.
SIGNED_VERSION = 2
TENSOR_SUFFIX = ".distcp"


def signed_text(content: Mapping[str, Any]) -> str:
    """A manifest's text, with the checksum of its content as the last field."""
    return json_text(with_signature(content, SIGNATURE), indent=2) + "\n"


def read_signed(text: str, *, newest_version: int) -> dict[str, Any]:
    """What a manifest's text says, if its checksum is that of its content.

    A changed bit that does not change the content, such as one of white space, is no damage.

    Args:
        text: Content of the file.
        newest_version: The newest format that is known.

    Raises:
        ValueError: the text is no JSON, of a newer format, or damaged.
        KeyError: a field is missing.
        TypeError: the text is something else than an object.
    """
    content = parse_json(text)
    version = content["format_version"]
    if type(version) is not int or not 1 <= version <= newest_version:
        raise ValueError(f"format_version={version!r} is newer than this library's {newest_version}"
                         if type(version) is int and version > newest_version else
                         f"format_version={version!r} is none of 1 to {newest_version}")
    if version < SIGNED_VERSION:
        return content
    content = without_signature(content, SIGNATURE)
    if content["checksums"].keys() != content["files"].keys():
        raise ValueError("it has not the checksums of all of its files")
    return content


def require_files(folder: Path, sizes: Mapping[str, int], checksums: Mapping[str, FileChecksums] | None) -> None:
    """Check that a checkpoint's files are there in their sizes, and prove those that hold no tensors.

    Args:
        folder: Folder of the checkpoint.
        sizes: Bytes of each file, by name.
        checksums: Checksums of each file; None: there are none.

    Raises:
        ValueError: there are no files, a name leads out of the folder, or a file is missing, of another size, damaged.
        OSError: a file cannot be read.
    """
    if not sizes:
        raise ValueError("it names no files")
    for name, size in sizes.items():
        if not is_plain_name(name):
            raise ValueError(f"it names a file {name!r}, which is not a file of this folder")
        file = folder / name
        actual = file.stat().st_size if file.is_file() else None
        if actual != size:
            found = "is missing" if actual is None else f"has {actual} bytes"
            raise ValueError(f"{name} {found}, {size} were written")
        if checksums is not None and checksums[name].num_bytes != size:
            raise ValueError(f"it says {size} bytes of {name}, and {checksums[name].num_bytes} of its checksums")
        if checksums is not None and not name.endswith(TENSOR_SUFFIX):
            try:
                prove_file(file, checksums[name])
            except DamagedFileError as error:
                raise ValueError(str(error)) from error


def flush(path: Path) -> None:
    """Have a file's content, or a folder's entries, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
