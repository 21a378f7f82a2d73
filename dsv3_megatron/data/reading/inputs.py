"""Which files are read, in which order, in which format, and which part of them belongs to a shard of the job.

Nothing is opened here. A file's format follows from its name: .jsonl, .json, .ndjson and names that say nothing hold
JSON lines (as Megatron-LM's --input), .parquet is Parquet, .txt, .md, .rst and .text are one document each. Any of the
first and the last may be compressed (.gz, .zst, .xz, .bz2). A folder gives its JSON lines and Parquet files; one that
holds none of either is a folder of plain text, a document a file.
"""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

FORMATS = ("auto", "jsonl", "parquet", "text")
_JSONL_SUFFIXES = (".jsonl", ".json", ".ndjson")
_TEXT_SUFFIXES = (".txt", ".md", ".rst", ".text")
_COMPRESSIONS = {".gz": "gz", ".zst": "zst", ".zstd": "zst", ".xz": "xz", ".bz2": "bz2"}
STDIN = "-"


@dataclass(frozen=True)
class InputFile:
    """A file to read. `size_bytes` and `mtime_ns` tell one version of it from another; both 0 for standard input."""

    path: str
    format: str
    compression: str = ""
    size_bytes: int = 0
    mtime_ns: int = 0

    @property
    def is_cut(self) -> bool:
        """Whether it can be read from any byte: lines, on disk, not compressed."""
        return self.format == "jsonl" and not self.compression and self.path != STDIN


@dataclass(frozen=True)
class Portion:
    """A part of a file: for one that can be cut, the lines that begin at bytes start..stop - 1; else all of it."""

    file: int
    start: int
    stop: int


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count` of a job, counted from 1."""

    index: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read I/N.

        Raises:
            ValueError: not two whole numbers with 1 <= I <= N.
        """
        index, _, count = text.partition("/")
        if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
            raise ValueError(f"shard={text} must be I/N with 1 <= I <= N, the first shard of three being 1/3")
        return cls(int(index), int(count))

    @property
    def suffix(self) -> str:
        """What the outputs of this shard are called beside the whole job's: nothing for a job in one part."""
        width = len(str(self.count))
        return "" if self.count == 1 else f".shard-{self.index:0{width}}-of-{self.count}"


def match_paths(pattern: str) -> list[str]:
    """The paths that a pattern names, sorted: itself if it exists, else the matches of the glob.

    One without matches is tried again with its square brackets taken as they are: folders have them in their names.
    """
    if os.path.exists(pattern):
        return [pattern]
    return sorted(glob.glob(pattern, recursive=True)) or sorted(
        glob.glob(pattern.replace("[", "[[]"), recursive=True)
    )


def shown(path: str | os.PathLike[str]) -> str:
    """A path as text that can be printed: bytes that are no UTF-8 are written out."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def expand_inputs(patterns: Sequence[str], *, format: str = "auto") -> list[InputFile]:
    """The files that paths, globs and folders name, in the order given; matches of one pattern are sorted.

    A file that several patterns name is read once, at its first place. In folders, hidden files are left out.

    Args:
        patterns: Paths, globs, folders, or "-" for standard input.
        format: Of all of them; "auto" goes by the names.

    Raises:
        ValueError: a pattern matches no file, or a format is not known or cannot be streamed.
    """
    if format not in FORMATS:
        raise ValueError(f"input_format={format!r} must be one of {', '.join(FORMATS)}")
    found: dict[str, InputFile] = {}
    for pattern in patterns:
        if pattern == STDIN:
            if format in ("parquet", "text"):
                what = "Parquet" if format == "parquet" else "a text file"
                way_out = "give a file" + (", or JSON lines" if format == "text" else "")
                raise ValueError(f"input -: {what} cannot be read from standard input; {way_out}")
            found.setdefault(pattern, InputFile(STDIN, "jsonl"))
            continue
        matches = match_paths(pattern)
        if not matches:
            what = "matches no file" if glob.has_magic(pattern) else "does not exist"
            raise ValueError(f"input {pattern} {what}: give files, globs or folders of JSON lines, Parquet or text")
        for match in matches:
            for file in _files_of(match, format):
                found.setdefault(file.path, file)
    return list(found.values())


def _files_of(path: str, format: str) -> Iterator[InputFile]:
    if not os.path.isdir(path):
        yield _describe(path, format)
        return
    paths = []
    for folder, subfolders, names in os.walk(path):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        paths += [os.path.join(folder, name) for name in names if not name.startswith(".")]
    files = [_describe(found, format, unnamed="text") for found in sorted(paths)]
    records = [file for file in files if file.format != "text"]
    if not files:
        raise ValueError(f"input {path}: the folder holds no files")
    if records and format == "auto":
        if len(records) < len(files):
            others = len(files) - len(records)
            print(
                f"note: {path}: {len(records)} JSON lines and Parquet files taken, {others} others left",
                file=sys.stderr,
            )
        files = records
    yield from files


def _describe(path: str, format: str, unnamed: str = "jsonl") -> InputFile:
    name, suffix = os.path.splitext(path.lower())
    compression = _COMPRESSIONS.get(suffix, "")
    if compression:
        suffix = os.path.splitext(name)[1]
    if format == "auto":
        by_suffix = (
            {".parquet": "parquet"} | dict.fromkeys(_JSONL_SUFFIXES, "jsonl") | dict.fromkeys(_TEXT_SUFFIXES, "text")
        )
        format = by_suffix.get(suffix, unnamed)
    if format == "parquet" and compression:
        raise ValueError(f"input {path}: Parquet compresses its own columns; decompress the file first")
    stat = os.stat(path)
    return InputFile(path, format, compression, stat.st_size, stat.st_mtime_ns)


def take_shard(files: Sequence[InputFile], shard: Shard) -> list[Portion]:
    """The portions of a shard: equal shares of the bytes on disk, in order.

    JSON lines that are not compressed are cut anywhere; other files belong whole to the shard in which they begin. The
    shards of a job, one after the other, are the job.

    Raises:
        ValueError: standard input cannot be shared.
    """
    if shard.count > 1 and any(file.path == STDIN for file in files):
        raise ValueError("input - (standard input) cannot be cut into shards; give files")
    total = sum(file.size_bytes for file in files)
    low, high = (total * edge // shard.count for edge in (shard.index - 1, shard.index))
    is_last = shard.index == shard.count
    portions = []
    begin = 0
    for index, file in enumerate(files):
        end = begin + file.size_bytes
        if file.is_cut:
            start, stop = max(low, begin) - begin, min(high, end) - begin
            if start < stop:
                portions.append(Portion(index, start, stop))
        elif low <= begin < high or (is_last and begin == high):
            portions.append(Portion(index, 0, file.size_bytes))
        begin = end
    return portions
