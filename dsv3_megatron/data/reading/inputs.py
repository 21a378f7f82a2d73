"""Which files are read, in which order, in which format, and which part of them belongs to a shard of the job.

A file's format follows from its name: .jsonl, .json and .ndjson hold JSON lines (as Megatron-LM's --input), .parquet
holds Parquet, .txt, .md, .rst and .text are one document each. Where the name says nothing, the content does, and it
always decides about compression (gz, zst, xz, bz2) and Parquet. A folder gives its JSON lines and Parquet files; one
without any of either is a folder of plain text, a document a file. Pipes (-, /dev/stdin, <(...), FIFOs) give JSON
lines, which may be compressed. Whatever is named is read or refused; what a folder or a glob leaves out is listed.
"""

from __future__ import annotations

import glob
import os
import stat
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dsv3_megatron.data.reading.file_content import look_into
from dsv3_megatron.data.reading.folders import is_marker, walk_files

FORMATS = ("auto", "jsonl", "parquet", "text")
_JSONL_SUFFIXES = (".jsonl", ".json", ".ndjson")
_TEXT_SUFFIXES = (".txt", ".md", ".rst", ".text")
_TEXT_NAMES = ("readme", "license", "licence", "notice", "copying", "changelog", "authors")
_PARQUET_SUFFIX = {".parquet": "parquet"}
_COMPRESSIONS = {".gz": "gz", ".zst": "zst", ".zstd": "zst", ".xz": "xz", ".bz2": "bz2"}
STDIN = "-"


@dataclass(frozen=True)
class InputFile:
    """A file to read. `size_bytes` and `mtime_ns` tell one version of it from another; 0 and -1 for a pipe."""

    path: str
    format: str
    compression: str = ""
    size_bytes: int = 0
    mtime_ns: int = 0

    @property
    def is_stream(self) -> bool:
        """Whether the file is standard input, a pipe or a device: read once, from its beginning."""
        return self.path == STDIN or self.mtime_ns < 0

    @property
    def is_cut(self) -> bool:
        """Whether the file can be read from any byte: lines, on disk, not compressed."""
        return self.format == "jsonl" and not self.compression and not self.is_stream


@dataclass(frozen=True)
class Portion:
    """A part of a file: for one that can be cut, the lines that begin at bytes start..stop - 1; else all of it."""

    file: int
    start: int
    stop: int


@dataclass(frozen=True)
class JobShard:
    """Part `index` of `count` of a job, counted from 1."""

    index: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> JobShard:
        """Read a shard that is written as I/N.

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
    if os.path.lexists(pattern):
        return [pattern]
    return sorted(glob.glob(pattern, recursive=True)) or sorted(
        glob.glob(pattern.replace("[", "[[]"), recursive=True)
    )


def shown(path: str | os.PathLike[str]) -> str:
    """A path as text that can be printed: bytes that are no UTF-8 are written out."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def expand_inputs(patterns: Sequence[str], *, format: str = "auto") -> list[InputFile]:
    """The files that paths, globs and folders name, in the order given; matches of one pattern are sorted.

    A file that several patterns name is read once, at its first place. What folders and globs leave out (hidden files,
    markers such as _SUCCESS, text beside records, ...) is counted on standard error.

    Args:
        patterns: Paths, globs, folders, pipes, or "-" for standard input.
        format: Format of all the files; "auto" goes by names and contents.

    Raises:
        ValueError: a pattern matches no file, or one is of a kind that cannot be read, or not as this format.
        OSError: a file or folder cannot be read.
    """
    if format not in FORMATS:
        raise ValueError(f"input_format={format!r} must be one of {', '.join(FORMATS)}")
    found: dict[str, InputFile] = {}
    for pattern in patterns:
        matches = [pattern] if pattern == STDIN else match_paths(pattern)
        if not matches:
            what = "matches no file" if glob.has_magic(pattern) else "does not exist"
            raise ValueError(f"input {pattern} {what}: give files, globs or folders of JSON lines, Parquet or text")
        left_out: Counter[str] = Counter()
        known = {os.path.realpath(name) for name in found}
        for match in matches:
            if matches != [pattern] and is_marker(match):
                left_out["a marker such as _SUCCESS"] += 1
                continue
            files = _files_of(match, format)
            for file in files:
                # Only a name of its own is read again where it is another of a file that was read.
                is_known = file.path not in found and os.path.realpath(file.path) in known
                if is_known and [file.path] != matches:
                    left_out["another name of a file that is read"] += 1
                else:
                    found.setdefault(file.path, file)
            known |= {os.path.realpath(file.path) for file in files}
        _note_left_out(pattern, left_out)
    return list(found.values())


def _files_of(path: str, format: str) -> list[InputFile]:
    if path != STDIN and os.path.islink(path) and not os.path.exists(path):
        raise ValueError(f"input {path} is a link to {os.readlink(path)}, which is not there: mend or remove it")
    if path != STDIN and os.path.isdir(path):
        return _files_in_folder(path, format)
    if path == STDIN or not os.path.isfile(path) or path.startswith(("/dev/", "/proc/")):
        real = os.path.realpath(path)
        if path != STDIN and os.path.isfile(real) and os.path.samefile(path, real) and not real.startswith("/proc/"):
            path = real  # /dev/stdin of a file: the workers have another standard input
        else:
            return [_describe_stream(path, format)]
    found = _describe(path, format)
    if found.foreign:
        raise ValueError(f"input {path}: {found.foreign}; --input-format text takes it as one text, whatever it is")
    _print_notes(path, [found])
    if not found.file.format:
        return [replace(found.file, format="jsonl")]  # empty
    if found.file.format == "text" and format == "auto" and not _format_by_name(path):
        print(f"note: {path}: taken as text, one document: neither name nor content say otherwise", file=sys.stderr)
    return [found.file]


def _describe_stream(path: str, format: str) -> InputFile:
    """Standard input, a pipe or a device, as JSON lines.

    Raises:
        ValueError: another format, or what cannot be read so.
    """
    where = "standard input" if path == STDIN else "a pipe"
    if path != STDIN and stat.S_ISBLK(os.stat(path).st_mode):
        raise ValueError(f"input {path} is a block device: give files, globs, folders or pipes")
    if format in ("parquet", "text"):
        what = "Parquet" if format == "parquet" else "a text file"
        way_out = "give a file" + (", or JSON lines" if format == "text" else "")
        raise ValueError(f"input {path}: {what} cannot be read from {where}; {way_out}")
    is_standard_input = path in ("/dev/stdin", "/dev/fd/0", "/proc/self/fd/0")
    return InputFile(STDIN if is_standard_input else path, "jsonl", "", 0, -1)


def _files_in_folder(path: str, format: str) -> list[InputFile]:
    """The files of a folder: its records, or its texts where it has none.

    Raises:
        ValueError: the folder holds nothing that is read, something else among texts, or records and texts that only
            their content tells apart.
    """
    paths, left_out = walk_files(path)
    found = [_describe(name, format) for name in paths]
    _print_notes(path, found)
    files = [one.file for one in found if not one.foreign]
    if format == "auto":
        files = _choose_kind(path, files, [one for one in found if one.foreign], left_out)
    if not files:
        raise ValueError(f"input {path}: the folder holds no files {_in_words(left_out)}".rstrip())
    _note_left_out(path, left_out, files)
    return files


def _choose_kind(
    path: str, files: list[InputFile], foreign: Sequence[_Described], left_out: Counter[str]
) -> list[InputFile]:
    """The records among a folder's files, or else all of them as texts; counts what is left out."""
    records = [file for file in files if file.format in ("jsonl", "parquet")]
    empty = [file for file in files if not file.format]
    if not records:
        if foreign:  # among texts it would be missed
            raise ValueError(f"input {foreign[0].file.path}: {foreign[0].foreign}; or take it out of {path}")
        return [replace(file, format=file.format or "text") for file in files]
    texts = [file for file in files if file.format == "text"]
    unsaid = [file for file in texts if not _format_by_name(file.path)]
    if unsaid and not any(_format_by_name(file.path) for file in records):
        raise ValueError(
            f"input {path} holds JSON lines, such as {records[0].path}, and text, such as {unsaid[0].path}, and no "
            "name tells them apart: give globs of the ones you mean, or --input-format"
        )
    left_out.update({"empty": len(empty), "text": len(texts), "not read here": len(foreign)})
    return records


def _note_left_out(path: str, left_out: Counter[str], files: Sequence[InputFile] = ()) -> None:
    if +left_out:
        kinds = Counter({"jsonl": "JSON lines", "parquet": "Parquet", "text": "text"}[file.format] for file in files)
        taken = "".join(f"{count} {kind} files taken; " for kind, count in kinds.items())
        print(f"note: {path}: {taken}{_in_words(left_out)}", file=sys.stderr)


def _in_words(left_out: Counter[str]) -> str:
    parts = ", ".join(f"{count} ({reason})" for reason, count in sorted((+left_out).items()))
    return f"left out: {parts}" if parts else ""


def _suffixes(path: str) -> tuple[str, str]:
    """(what the name says of the format, of the compression); "" where it says nothing."""
    name, suffix = os.path.splitext(path.lower())
    compression = _COMPRESSIONS.get(suffix, "")
    return (os.path.splitext(name)[1] if compression else suffix), compression


def _format_by_name(path: str) -> str:
    if os.path.basename(path).lower() in _TEXT_NAMES:
        return "text"
    by_suffix = dict.fromkeys(_JSONL_SUFFIXES, "jsonl") | dict.fromkeys(_TEXT_SUFFIXES, "text") | _PARQUET_SUFFIX
    return by_suffix.get(_suffixes(path)[0], "")


@dataclass(frozen=True)
class _Described:
    """A file on disk: its format "" if it is empty and its name says nothing; what it is if that is not read here; and
    where its name and its content part."""

    file: InputFile
    foreign: str
    note: str


def _describe(path: str, format: str) -> _Described:
    stat_result = os.stat(path)
    suffix, named_compression = _suffixes(path)
    content = look_into(path, suffix)
    named, compression, note = _format_by_name(path), content.compression, ""
    if not stat_result.st_size:
        compression = named_compression
    elif compression != named_compression:
        note = f"compressed as {compression}" if compression else "not compressed"
    if format == "auto":
        foreign = content.foreign
        if content.format == "parquet" and named != "parquet":
            named, note = "parquet", "Parquet"
        format = named or content.format
    else:
        foreign = ""
    if format == "parquet" and compression:
        raise ValueError(f"input {path}: Parquet compresses its own columns; decompress the file first")
    file = InputFile(path, format, compression, stat_result.st_size, stat_result.st_mtime_ns)
    return _Described(file, foreign, note)


def _print_notes(path: str, found: Sequence[_Described]) -> None:
    """Say where names and contents part, once for each kind."""
    for note, count in Counter(one.note for one in found if one.note).items():
        example = next(one.file.path for one in found if one.note == note)
        which = example if count == 1 else f"{path}: {count} files such as {example}"
        print(f"note: {which}: {note} by content, which counts, whatever the name says", file=sys.stderr)


def take_shard(files: Sequence[InputFile], shard: JobShard) -> list[Portion]:
    """The portions of a shard: equal shares of the bytes on disk, in order.

    JSON lines that are not compressed are cut anywhere; other files belong whole to the shard in which they begin. The
    shards of a job, one after the other, are the job.

    Raises:
        ValueError: standard input and pipes cannot be shared.
    """
    streams = [file.path for file in files if file.is_stream]
    if shard.count > 1 and streams:
        what = "standard input" if streams[0] == STDIN else "a pipe"
        raise ValueError(f"input {streams[0]} ({what}) cannot be cut into shards; give files")
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
