"""Blocks of input to documents: every format's records as texts, each knowing where it stands or what is wrong with it.

`RecordReader` is what preprocessing uses, block by block; `read_documents` is the same as a plain iterator for whoever
needs texts (training a tokenizer), and `sample_documents` reads a little of every file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from dsv3_megatron.data.reading.blocks import BLOCK_BYTES, Block, Column, InputPosition, iterate_blocks
from dsv3_megatron.data.reading.byte_streams import DamagedFile, count_lines, open_stream, read_lines, read_some
from dsv3_megatron.data.reading.inputs import InputFile, JobShard, Portion, take_shard
from dsv3_megatron.data.reading.json_lines import (
    LONG_LINE_BYTES,
    UTF8_BOM,
    LineParser,
    RecordError,
    Reject,
    TextParser,
    find_invalid_utf8,
    invalid_utf8,
)

# A line may have six times as many, with every character escaped: all of it is held at a time.
DEFAULT_MAX_DOCUMENT_BYTES = 100_000_000
_SAMPLE_BLOCK_BYTES = 64_000
_SAMPLES_PER_FILE = 4


class Text:
    """One text of a record: whole, in pieces (a long one), or what is wrong with it."""

    __slots__ = ("text", "pieces", "error", "_num_bytes")

    def __init__(
        self, text: str | None = None, *, pieces: Iterator[str] | None = None, error: RecordError | None = None
    ) -> None:
        self.text, self.pieces, self.error = text, pieces, error
        self._num_bytes = -1

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes; those of a text in pieces are known when it has been gathered."""
        if self._num_bytes < 0:
            text = self.text or ""
            self._num_bytes = len(text) if text.isascii() else len(text.encode("utf-8"))
        return self._num_bytes

    def gather(self, max_bytes: int) -> bytearray | None:
        """The UTF-8 bytes of a text in pieces; None if they are more than max_bytes.

        Raises:
            RecordError: a piece that cannot be taken.
        """
        assert self.pieces is not None
        data = bytearray()
        for piece in self.pieces:
            data += piece.encode("utf-8")
            if len(data) > max_bytes:
                return None
        self._num_bytes = len(data)
        return data


@dataclass
class Reading:
    """What reading a block found beside its texts.

    Attributes:
        num_lines: Lines read.
        notes: What was taken although it is unusual, by kind.
        rejects: Faults that are no document's: a damaged file, a line too long to be read. `line` as in `Record`.
    """

    num_lines: int = 0
    notes: Counter[str] = field(default_factory=Counter)
    rejects: list[Reject] = field(default_factory=list)


@dataclass(frozen=True)
class Record:
    """A text for each key. `byte` is the record's place in its file (for Parquet the row); `line` its number in the
    block, from 1 (for text files, which of the block's files), 0 for Parquet."""

    texts: list[Text]
    byte: int
    line: int


class RecordReader:
    """Reads the documents of blocks.

    Args:
        files: Inputs of the whole job; blocks point at them.
        keys: Names of the texts in each record.
        max_document_bytes: Longer texts need not be read.
        is_long_split: Give the texts of long lines in pieces.
        parser: Takes as many texts as there are keys out of a line of JSON; None: those under the keys.
    """

    def __init__(
        self,
        files: Sequence[InputFile],
        keys: Sequence[str],
        *,
        max_document_bytes: int = DEFAULT_MAX_DOCUMENT_BYTES,
        is_long_split: bool = False,
        parser: TextParser | None = None,
    ) -> None:
        self.files, self.keys = files, tuple(keys)
        self.max_document_bytes = max_document_bytes
        self._long_line_bytes = LONG_LINE_BYTES if is_long_split else None
        self._parser = parser or LineParser(keys)

    @property
    def max_line_bytes(self) -> int:
        """Beyond this a line cannot hold a document, even with every character escaped."""
        return 6 * self.max_document_bytes + 1_000_000

    def read(self, block: Block, reading: Reading) -> Iterator[Record]:
        """Yield a block's records and fill in `reading`."""
        file = self.files[block.file]
        if isinstance(block.data, list):
            yield from self._rows(block, block.data)
        elif file.format == "text":
            yield from self._files(block)
        elif block.data is None:
            first, data, reject = read_lines(file.path, block.start, block.stop, max_line_bytes=self.max_line_bytes)
            yield from self._lines(first, data, reading)
            self._note(reject, reading)
        else:
            yield from self._lines(block.start, block.data, reading)
        self._note(block.reject, reading)

    def _note(self, reject: Reject | None, reading: Reading) -> None:
        if reject is not None:
            reading.num_lines += 1
            reading.rejects.append(replace(reject, line=reading.num_lines))

    def _lines(self, first: int, data: bytes | bytearray, reading: Reading) -> Iterator[Record]:
        """JSON lines; `first` is the byte of the file at which they begin."""
        is_utf8 = find_invalid_utf8(data) is None
        start = 0
        if first == 0 and data.startswith(UTF8_BOM):
            start = len(UTF8_BOM)
            reading.notes["byte-order mark at the start of a file, left out"] += 1
        view = memoryview(data)
        while start < len(data):
            newline = data.find(b"\n", start)
            stop = len(data) if newline < 0 else newline
            reading.num_lines += 1
            at, start = start, stop + 1
            if stop - at < 64 and not data[at:stop].strip():
                reading.notes["blank lines, skipped"] += 1
                continue
            yield Record(self._texts_of_line(view[at:stop], is_utf8), first + at, reading.num_lines)

    def _texts_of_line(self, line: memoryview, is_utf8: bool) -> list[Text]:
        try:
            if not is_utf8:
                at = find_invalid_utf8(line)
                if at is not None:
                    raise invalid_utf8(bytes(line), at)
            if self._long_line_bytes is not None and len(line) > self._long_line_bytes:
                return [Text(pieces=pieces) for pieces in self._parser.parse_long(line)]
            return [Text(text) for text in self._parser.parse(line)]
        except RecordError as error:
            return [Text(error=error)] * len(self.keys)

    def _rows(self, block: Block, columns: list[Column]) -> Iterator[Record]:
        for row in range(block.stop - block.start):
            texts = []
            for key, column in zip(self.keys, columns, strict=True):
                if column.is_null and column.is_null[row]:
                    texts.append(Text(error=RecordError("not a string", f"{key!r} is null", "give every row a text")))
                else:
                    texts.append(_decoded(column.data[column.offsets[row] : column.offsets[row + 1]]))
            yield Record(texts, block.start + row, 0)

    def _files(self, block: Block) -> Iterator[Record]:
        for number in range(block.stop):
            text = self._read_text(self.files[block.file + number])
            yield Record([text] * len(self.keys), 0, number + 1)

    def _read_text(self, file: InputFile) -> Text:
        data = bytearray()
        try:
            with open_stream(file) as stream:
                while chunk := read_some(stream):
                    data += chunk
                    if len(data) > self.max_document_bytes:
                        return Text(error=too_large(f"more than {self.max_document_bytes}", self.max_document_bytes))
        except DamagedFile as damage:
            reject = damage.reject(len(data))
            return Text(error=RecordError(reject.reason, reject.detail, reject.way_out, reject.byte))
        if data.startswith(UTF8_BOM):
            del data[: len(UTF8_BOM)]
        nul = data.find(b"\0")
        if nul >= 0 and not data.startswith((b"\xff\xfe", b"\xfe\xff")):
            return Text(error=RecordError("NUL byte", "a NUL byte", "is it a text file? leave it out", nul))
        return _decoded(bytes(data))


def too_large(num_bytes: int | str, limit: int) -> RecordError:
    """The error for a document beyond max_document_bytes."""
    detail = f"a document of {num_bytes} bytes, over max_document_bytes={limit}"
    return RecordError("document too large", detail, "raise --max-document-bytes")


def _decoded(data: bytes) -> Text:
    try:
        return Text(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Text(error=invalid_utf8(data, error.start))


class LineCounter:
    """Turns a block's line numbers into a file's, from blocks that come in order."""

    def __init__(self, files: Sequence[InputFile], file: int = -1, num_lines: int | None = None) -> None:
        self._files = files
        self.file, self.num_lines = file, num_lines

    def place(self, block: Block, reject: Reject) -> tuple[str, Reject]:
        """The file of a fault in this block, and the Reject with its line in that file."""
        file = self._files[block.file]
        if file.format == "text":
            return self._files[block.file + reject.line - 1].path, replace(reject, line=0)
        if file.format == "parquet":
            return file.path, reject
        before = self._before(block)
        if before is None and file.is_cut:
            before = count_lines(file.path, block.start) + (not _begins_line(file.path, block.start))
        return file.path, replace(reject, line=(before or 0) + reject.line)

    def pass_block(self, block: Block, num_lines: int) -> None:
        """Go behind a block."""
        before = self._before(block)
        self.file, self.num_lines = block.file, None if before is None else before + num_lines

    def _before(self, block: Block) -> int | None:
        if block.file == self.file:
            return self.num_lines
        return 0 if block.start == 0 else None


def _begins_line(path: str, at: int) -> bool:
    with open(path, "rb") as stream:
        stream.seek(max(0, at - 1))
        return at == 0 or stream.read(1) == b"\n"


def describe(path: str, file_format: str, reject: Reject) -> str:
    """A fault in words: file, line and byte (or row), what it is, what to do."""
    where = path
    if file_format == "parquet":
        where += f", row {reject.byte}"
    else:
        where += (f", line {reject.line}" if reject.line else "") + f", byte {reject.byte}"
    return f"{where}: {reject.detail}; {reject.way_out}"


def read_documents(files: Sequence[InputFile], *keys: str) -> Iterator[str]:
    """The text of every document, in order; of several keys, one after the other in each document.

    Raises:
        ValueError: the first that cannot be taken, with file, line and byte.
    """
    reader = RecordReader(files, keys)
    lines = LineCounter(files)
    for block in _blocks(files, take_shard(files, JobShard()), reader, BLOCK_BYTES):
        reading = Reading()
        for record in reader.read(block, reading):
            for text in record.texts:
                if text.error is not None:
                    reject = replace(text.error.reject, byte=record.byte + text.error.reject.byte, line=record.line)
                    path, reject = lines.place(block, reject)
                    raise ValueError(describe(path, files[block.file].format, reject))
                assert text.text is not None
                yield text.text
        for reject in reading.rejects:
            path, reject = lines.place(block, reject)
            raise ValueError(describe(path, files[block.file].format, reject))
        lines.pass_block(block, reading.num_lines)


def sample_documents(
    files: Sequence[InputFile], portions: Sequence[Portion], keys: Sequence[str], *, max_bytes: int
) -> Iterator[tuple[str, str]]:
    """(where it is from, text) of a few documents of every file, long ones cut short; faulty ones are passed over.

    Files that can be cut are sampled in four places, others at their beginning; pipes cannot be sampled.

    Args:
        files: Inputs of the whole job.
        portions: Portions of the files that are sampled.
        keys: Names of the texts in each record.
        max_bytes: Bytes of text in all, shared by the files.
    """
    reader = RecordReader(files, keys)
    share = max(2000, max_bytes // max(1, len(portions)))
    for portion in portions:
        file = files[portion.file]
        if file.is_stream:
            continue
        step = max(1, (portion.stop - portion.start) // _SAMPLES_PER_FILE)
        starts = range(portion.start, portion.stop, step) if file.is_cut else [portion.start]
        for start in list(starts)[:_SAMPLES_PER_FILE]:
            left = share // len(starts)
            for block in _blocks(files, [replace(portion, start=start)], reader, _SAMPLE_BLOCK_BYTES):
                for record in reader.read(block, Reading()):
                    texts = [text.text[: max(1, left)] for text in record.texts if text.text]
                    yield from ((f"{file.path}, byte {record.byte}", text) for text in texts)
                    left -= sum(map(len, texts))
                    if left <= 0:
                        break
                break  # one block is enough


def _blocks(
    files: Sequence[InputFile], portions: Sequence[Portion], reader: RecordReader, block_bytes: int
) -> Iterator[Block]:
    return iterate_blocks(
        files,
        portions,
        keys=reader.keys,
        position=InputPosition(),
        max_line_bytes=reader.max_line_bytes,
        block_bytes=block_bytes,
    )
