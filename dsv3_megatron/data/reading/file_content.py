"""What a file holds, by its first bytes: compression, Parquet, JSON lines, text, or something that is not read here."""

from __future__ import annotations

import sys
import zlib
from dataclasses import dataclass
from typing import Any

from dsv3_megatron.config.json_files import parse_json

_HEAD_BYTES = 65_536
_MAGICS = {b"\x1f\x8b": "gz", b"\x28\xb5\x2f\xfd": "zst", b"\xfd7zXZ\x00": "xz", b"BZh": "bz2"}
MAGIC_BYTES = max(map(len, _MAGICS))
_PARQUET = b"PAR1"
# (where, bytes) -> what it is; none of these begins a text.
_FOREIGN = {
    (0, b"PK\x03\x04"): "a zip archive, unpack it",
    (257, b"ustar"): "a tar archive, unpack it",
    (0, b"7z\xbc\xaf\x27\x1c"): "a 7z archive, unpack it",
    (0, b"ARROW1"): "an Arrow file, write Parquet",
    (0, b"ORC"): "an ORC file, write Parquet",
    (0, b"Obj\x01"): "an Avro file, write Parquet",
    (0, b"%PDF-"): "a PDF, extract its text",
    (0, b"SQLite format 3\x00"): "a database, write JSON lines",
    (0, b"MMIDIDX\x00\x00"): "the index of a tokenized dataset",
}
_FOREIGN_SUFFIXES = {
    ".csv": "CSV, write JSON lines or Parquet",
    ".tsv": "CSV, write JSON lines or Parquet",
    ".zip": "a zip archive, unpack it",
    ".tar": "a tar archive, unpack it",
    ".tgz": "a tar archive, unpack it",
    ".7z": "a 7z archive, unpack it",
    ".arrow": "an Arrow file, write Parquet",
    ".feather": "an Arrow file, write Parquet",
}


@dataclass(frozen=True)
class FileContent:
    """The kind of a file's content, as `look_into` found it.

    Attributes:
        format: "jsonl", "parquet", "text", or "" for an empty file and what is not read here.
        compression: "gz", "zst", "xz", "bz2" or "".
        foreign: Kind of a content that is not read here, and what to do; "" for all else.
    """

    format: str
    compression: str
    foreign: str = ""


def decompressor(compression: str) -> Any:
    """The module whose open() reads a compression."""
    if compression == "gz":
        import gzip

        return gzip
    if compression == "xz":
        import lzma

        return lzma
    if compression == "bz2":
        import bz2

        return bz2
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd


def compression_of(head: bytes) -> str:
    """The compression that data begins with; "" for none."""
    return next((name for magic, name in _MAGICS.items() if head.startswith(magic)), "")


def is_parquet(head: bytes) -> bool:
    """Whether data begins as a Parquet file does."""
    return head.startswith(_PARQUET)


def look_into(path: str, suffix: str) -> FileContent:
    """Find out what a file on disk holds.

    Args:
        path: Path of the file.
        suffix: Ending of the file's name, lower case, behind which a compression's may have stood; decides about CSV
            and archives.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as stream:
        head = stream.read(_HEAD_BYTES)
    compression = compression_of(head)
    if compression:
        head = _decompressed_head(path, compression)
    foreign = next((what for (at, magic), what in _FOREIGN.items() if head[at:].startswith(magic)), "")
    foreign = foreign or _FOREIGN_SUFFIXES.get(suffix, "")
    if foreign or not head:
        return FileContent("", compression, foreign)
    return FileContent(_format_of(head), compression)


def _decompressed_head(path: str, compression: str) -> bytes:
    """The first bytes of what is in a file, as far as they can be had: whoever reads it all reports damage."""
    module = decompressor(compression)
    damage = tuple(getattr(module, name) for name in ("LZMAError", "ZstdError") if hasattr(module, name))
    head = b""
    try:
        with module.open(path, "rb") as stream:
            while len(head) < _HEAD_BYTES and (chunk := stream.read1(_HEAD_BYTES)):
                head += chunk
    except (OSError, EOFError, ValueError, zlib.error, *damage) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk, not the data
    return head


def _format_of(head: bytes) -> str:
    if is_parquet(head):
        return "parquet"
    lines = head.removeprefix(b"\xef\xbb\xbf").lstrip().split(b"\n", 1)
    if not lines[0].startswith(b"{"):
        return "text"
    if len(lines) == 1 and len(head) >= _HEAD_BYTES:
        return "jsonl" if lines[0][1:].lstrip().startswith(b'"') else "text"  # its first line goes on
    try:
        return "jsonl" if isinstance(parse_json(lines[0]), dict) else "text"
    except ValueError:
        return "text"
