"""A job's input as blocks: pieces of work of a few megabytes, in order, each with the position behind it.

Lines of a file on disk are only pointed at (whoever encodes the block reads them); what must be read from its beginning
(compressed files, standard input, Parquet) is read here and travels in the block. Starting again from a block's
position gives the blocks after it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dsv3_megatron.data.reading.byte_streams import line_blocks, open_stream
from dsv3_megatron.data.reading.inputs import InputFile, Portion
from dsv3_megatron.data.reading.json_lines import Reject

BLOCK_BYTES = 8_000_000
_MAX_ROWS = 65_536
_REPEATED_BYTES = 64
_EXPANDING_BYTES, _EXPANDING = 32_000_000, 200


@dataclass(frozen=True)
class InputPosition:
    """The place at which the next block begins: in which file, at which byte (uncompressed), or row of Parquet."""

    file: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Column:
    """Rows of a Parquet column: UTF-8 data[offsets[i]:offsets[i + 1]] each; `is_null` is empty where none is."""

    offsets: list[int]
    data: bytes
    is_null: list[bool]


@dataclass(frozen=True)
class Block:
    """A piece of work.

    Attributes:
        file: Index of the file; of text files, of the first.
        start: First byte (lines) or row (Parquet); 0 for text files.
        stop: Byte or row behind the last; for text files, how many of them.
        data: Lines, or a Column for each key; None for what lies on disk.
        next: Place at which the next block begins.
        input_bytes: Bytes on disk of this shard's input that are done with this block.
        reject: A fault of the input behind this block's data.
    """

    file: int
    start: int
    stop: int
    data: bytes | bytearray | list[Column] | None
    next: InputPosition
    input_bytes: int
    reject: Reject | None = None

    def detach_lines(self) -> tuple[Block, bytes | bytearray | None]:
        """Take the lines out of the block, for sending them apart: the block without them, and the lines."""
        if self.data is None or isinstance(self.data, list):
            return self, None
        return replace(self, data=None), self.data

    def attach_lines(self, lines: bytes | bytearray | None) -> Block:
        """Put back the lines that `detach_lines` took out of the block."""
        return self if lines is None else replace(self, data=lines)


def iterate_blocks(
    files: Sequence[InputFile],
    portions: Sequence[Portion],
    *,
    keys: Sequence[str],
    position: InputPosition,
    max_line_bytes: int,
    block_bytes: int = BLOCK_BYTES,
) -> Iterator[Block]:
    """Yield the blocks of a shard from a position on.

    Args:
        files: Inputs of the whole job.
        portions: What belongs to this shard, in order.
        keys: Columns of Parquet.
        position: Position to begin at: an earlier block's `next`, or Position() for the beginning.
        max_line_bytes: A longer line is left out with a Reject.
        block_bytes: Size to aim at.
    """
    done = 0
    at = 0
    while at < len(portions):
        portion = portions[at]
        file, size = files[portion.file], portion.stop - portion.start
        start = max(portion.start, position.offset) if portion.file == position.file else portion.start
        if portion.file < position.file or (file.is_cut and start >= portion.stop):
            pass  # done before
        elif file.format == "text":
            count = _count_texts(files, portions[at:], block_bytes)
            done += sum(portion.stop for portion in portions[at : at + count])
            yield Block(portion.file, 0, count, None, InputPosition(portion.file + count), done)
            at += count
            continue
        elif file.is_cut:
            for first in range(start, portion.stop, block_bytes):
                stop = min(first + block_bytes, portion.stop)
                yield Block(portion.file, first, stop, None, InputPosition(portion.file, stop),
                            done + stop - portion.start)
        elif file.format == "parquet":
            yield from _parquet_blocks(portion.file, file, keys, start, done, block_bytes)
        else:
            yield from _stream_blocks(portion.file, file, start, done, block_bytes, max_line_bytes)
        done += size
        at += 1


def _count_texts(files: Sequence[InputFile], portions: Sequence[Portion], block_bytes: int) -> int:
    """How many of the text files at the front make a block: neighbours, of about its size together."""
    count = size = 0
    for portion in portions:
        if files[portion.file].format != "text" or portion.file != portions[0].file + count or size >= block_bytes:
            break
        count += 1
        size += portion.stop
    return count


def _stream_blocks(
    index: int, file: InputFile, start: int, done: int, block_bytes: int, max_line_bytes: int
) -> Iterator[Block]:
    with open_stream(file) as stream:
        for first, lines, end, reject, is_last in line_blocks(
            stream, start, block_bytes=block_bytes, max_line_bytes=max_line_bytes
        ):
            on_disk = 0 if file.is_stream else os.lseek(stream.fileno(), 0, os.SEEK_CUR)
            following = InputPosition(index + 1) if is_last else InputPosition(index, end)
            yield Block(index, first, end, lines, following, done + min(on_disk, file.size_bytes), reject)


def _parquet_blocks(
    index: int, file: InputFile, keys: Sequence[str], start: int, done: int, block_bytes: int
) -> Iterator[Block]:
    """Rows of a Parquet file, read row group by row group in batches; a fault ends the file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0

    def fault(reject: Reject) -> Block:
        return Block(index, row, row, [], InputPosition(index + 1), done + file.size_bytes, reject)

    try:
        parquet = pq.ParquetFile(file.path, buffer_size=1 << 20)
        problem = _wrong_column(parquet.schema_arrow, keys)
        if problem is not None:
            yield fault(problem)
            return
        total = max(1, parquet.metadata.num_rows)
        for group in range(parquet.num_row_groups):
            meta = parquet.metadata.row_group(group)
            if row + meta.num_rows <= start:
                row += meta.num_rows
                continue
            problem = _expanding(meta, keys)
            if problem is not None:
                yield fault(problem)
                return
            num_rows = max(1, min(_MAX_ROWS, meta.num_rows * block_bytes // max(1, meta.total_byte_size)))
            # Small, or few bytes a row: texts may be there once for many rows, and stay so until they are needed.
            is_repeated = meta.total_byte_size < max(_EXPANDING_BYTES, _REPEATED_BYTES * meta.num_rows)
            reader = parquet
            if is_repeated:
                reader = pq.ParquetFile(file.path, buffer_size=1 << 20, read_dictionary=list(keys))
            for batch in reader.iter_batches(batch_size=num_rows, row_groups=[group], columns=list(keys),
                                             use_threads=False):
                sizes = _decoded_bytes([batch.column(key) for key in keys])
                large = int(sizes.sum())
                if large > max(_EXPANDING_BYTES, _EXPANDING * file.size_bytes):
                    yield fault(Reject("damaged file", f"{batch.num_rows} rows have {large} bytes of text that the "
                                       f"file has once in its {file.size_bytes}, over {_EXPANDING} times as many",
                                       "is it text? leave it out, or write each text once", row))
                    return
                for rows in _row_ranges(sizes, max(0, start - row), block_bytes):
                    first, end = row + rows.start, row + rows.stop
                    columns = [_column(batch.column(key).slice(rows.start, len(rows))) for key in keys]
                    on_disk = done + file.size_bytes * end // total
                    yield Block(index, first, end, columns, InputPosition(index, end), on_disk)
                row += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        why = " ".join(str(error).split())[:200]
        yield fault(Reject("damaged file", f"not a whole Parquet file ({why})", "fetch or make the file again", row))


def _expanding(meta: Any, keys: Sequence[str]) -> Reject | None:
    """A row group whose pages are small on disk and large in memory, as no text makes them."""
    for place in range(meta.num_columns):
        column = meta.column(place)
        small, large = column.total_compressed_size, column.total_uncompressed_size
        if column.path_in_schema.split(".")[0] in keys and large > _EXPANDING_BYTES and large > _EXPANDING * small:
            return Reject("damaged file", f"column {column.path_in_schema!r} has {large} bytes in {small} of the file, "
                          f"over {_EXPANDING} times as many", "is it text? leave it out, or write it without "
                          "compression")
    return None


def _decoded_bytes(arrays: Sequence[Any]) -> np.ndarray:
    """Bytes that the texts of each row of some columns will have, int64; 0 for columns that have them already.

    Raises:
        pyarrow.ArrowInvalid: a row names a text that is not there, which pyarrow does not look at when it reads.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    sizes = np.zeros(len(arrays[0]), np.int64)
    for array in arrays:
        if not pa.types.is_dictionary(array.type):
            continue
        array.validate(full=True)
        lengths = pc.binary_length(array.dictionary).fill_null(0).to_numpy(zero_copy_only=False)
        indices = array.indices.fill_null(0).to_numpy(zero_copy_only=False)
        sizes += np.asarray(lengths, np.int64)[indices] if len(lengths) else 0
    return sizes


def _row_ranges(sizes: np.ndarray, start: int, block_bytes: int) -> Iterator[range]:
    """Rows of a batch from `start` on, cut where the texts of their columns together would exceed a block.

    Args:
        sizes: Bytes that the texts of each row will have.
        start: First row that is wanted.
        block_bytes: Size to aim at.
    """
    ends = np.cumsum(sizes[start:])
    first, passed = 0, 0
    while first < len(ends):
        stop = max(first + 1, int(np.searchsorted(ends, passed + block_bytes, side="right")))
        yield range(start + first, start + min(stop, len(ends)))
        first, passed = stop, int(ends[min(stop, len(ends)) - 1])


def _wrong_column(schema: Any, keys: Sequence[str]) -> Reject | None:
    from pyarrow import types

    for key in keys:
        if key not in schema.names:
            found = ", ".join(schema.names) or "none"
            detail = f"no column {key!r} (columns: {found[:200]})"
            return Reject("missing key", detail, "name the text's column with --json-keys")
        places = [place for place, name in enumerate(schema.names) if name == key]
        if len(places) > 1:
            named = " and ".join(f"{place + 1} ({schema.field(place).type})" for place in places)
            return Reject("ambiguous key", f"columns {named} are all named {key!r}", "rename all but one of them")
        kind = schema.field(key).type
        kind = kind.value_type if types.is_dictionary(kind) else kind
        is_text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
        if not (is_text or types.is_binary(kind) or types.is_large_binary(kind)):
            return Reject("not a string", f"column {key!r} holds {kind}", "the text must be a column of strings")
    return None


def _column(array: Any) -> Column:
    import pyarrow as pa

    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    array = array.cast(pa.large_binary())
    _, offsets_buffer, data_buffer = array.buffers()
    offsets_R = np.frombuffer(offsets_buffer, np.int64)[array.offset : array.offset + len(array) + 1]
    first, last = int(offsets_R[0]), int(offsets_R[-1])
    data = data_buffer.slice(first, last - first).to_pybytes() if last > first else b""
    return Column((offsets_R - first).tolist(), data, array.is_null().to_pylist() if array.null_count else [])
