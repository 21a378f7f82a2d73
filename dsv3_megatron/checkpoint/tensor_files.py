"""Checkpoints of ours read and written a tensor at a time, without a model and without holding them.

A checkpoint is torch.distributed.checkpoint's format, as megatron.core.dist_checkpointing writes and loads it: files of
chunks, each chunk a tensor as `torch.save` writes it, and an index (`.metadata`) that says which part of which tensor
is where. This module finds a chunk's bytes inside its file, and lays out files.
"""

from __future__ import annotations

import dataclasses
import io
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from dsv3_megatron.checkpoint.byte_ranges import ByteRange, read_byte_ranges
from dsv3_megatron.checkpoint.folder import CheckpointError, Manifest
from dsv3_megatron.checkpoint.proved_files import CheckpointFiles
from dsv3_megatron.checkpoint.tensor_frames import frame_of, known_frame
from dsv3_megatron.checkpoint.tensor_index import INDEX, READ_ERRORS, read_index
from dsv3_megatron.data.checksums import BlockVerifier, damages
from dsv3_megatron.process.cores import usable_cores
from dsv3_megatron.process.unpickling import load_tensors

_COMMON_FILE = "__0_common.distcp"
# More than torch.save writes before or after the values of a tensor.
_FRAME_BYTES = 64 << 10


@dataclass(frozen=True)
class TensorPart:
    """A rectangular part of a tensor, as one entry of one file.

    Attributes:
        key: The tensor's name in the checkpoint.
        shape: Shape of the whole tensor.
        offsets: Index of the part's first element in the tensor, by axis.
        sizes: The part's shape.
        dtype: "bfloat16" or "float32".
        file: Name of the file.
        start: First byte of the entry in it.
        length: Bytes of the entry.
    """

    key: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: str
    file: str
    start: int = 0
    length: int = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of the values alone."""
        return torch.Size(self.sizes).numel() * getattr(torch, self.dtype).itemsize


# ---- writing -----------------------------------------------------------------------------------------


def lay_out(chunks: Sequence[TensorPart]) -> list[TensorPart]:
    """Give chunks their places in a file, one after the other: each is its values with its frame (tensor_frames.py).

    Args:
        chunks: Parts in the order in which they will be in the file.
    """
    placed, start = [], 0
    for chunk in chunks:
        length = frame_of(getattr(torch, chunk.dtype), chunk.sizes).length
        placed.append(dataclasses.replace(chunk, start=start, length=length))
        start += length
    return placed


def write_index(folder: Path, chunks: Iterable[TensorPart], common: dict[str, Any]) -> None:
    """Complete a folder of chunk files to a checkpoint that megatron.core.dist_checkpointing loads.

    Args:
        folder: Folder of the chunk files.
        chunks: All of them, with their places.
        common: What the checkpoint holds besides tensors.
    """
    tensors: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for chunk in chunks:
        if chunk.key not in tensors:
            tensors[chunk.key] = TensorStorageMetadata(
                TensorProperties(dtype=getattr(torch, chunk.dtype)), torch.Size(chunk.shape), [])
        offsets = torch.Size(chunk.offsets)
        tensors[chunk.key].chunks.append(ChunkStorageMetadata(offsets, torch.Size(chunk.sizes)))
        places[MetadataIndex(chunk.key, offsets)] = _StorageInfo(chunk.file, chunk.start, chunk.length)
    key = ShardedObject("common_state", None, (1,), (0,)).unique_key
    content = io.BytesIO()
    torch.save([common], content)
    (folder / _COMMON_FILE).write_bytes(content.getvalue())
    tensors[key] = BytesStorageMetadata()
    places[MetadataIndex(key)] = _StorageInfo(_COMMON_FILE, 0, content.tell())
    (folder / INDEX).write_bytes(pickle.dumps(Metadata(state_dict_metadata=tensors, storage_data=places)))
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))


# ---- reading -----------------------------------------------------------------------------------------


class TensorFiles:
    """The tensors of a checkpoint, by key.

    Args:
        manifest: One checkpoint.
        verify: How far files are compared with their checksums: "read" (what is read), "all" (every file, now) or
            "none".

    Raises:
        CheckpointError: the checkpoint's index cannot be read, or a file is damaged.
    """

    def __init__(self, manifest: Manifest, verify: str = "read") -> None:
        self.folder = folder = manifest.path
        self._files = CheckpointFiles(manifest, verify)
        if verify == "all":
            for _, damage in damages(self._files.verifiers, usable_cores()):
                raise CheckpointError(f"checkpoint {folder}: {damage}; take another checkpoint, or a copy of this one")
        try:
            metadata = read_index(manifest)
        except READ_ERRORS as error:
            raise CheckpointError(f"checkpoint {folder} is truncated or corrupt: .metadata: {error}") from error
        self._chunks: dict[str, list[TensorPart]] = {}
        # A layer's experts may be one chunk, read expert by expert: it is looked into once.
        self._starts: dict[tuple[str, int], int] = {}
        for key, entry in metadata.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                self._chunks[key] = [self._chunk(key, entry, part, metadata) for part in entry.chunks]
        self._by_offsets = {(chunk.key, chunk.offsets): chunk for chunks in self._chunks.values() for chunk in chunks}

    def _chunk(self, key: str, entry: TensorStorageMetadata, part: ChunkStorageMetadata, metadata: Metadata
               ) -> TensorPart:
        assert metadata.storage_data is not None
        place = metadata.storage_data[MetadataIndex(key, part.offsets)]
        dtype = str(entry.properties.dtype).removeprefix("torch.")
        return TensorPart(key, tuple(entry.size), tuple(part.offsets), tuple(part.sizes), dtype, place.relative_path,
                          place.offset, place.length)

    def keys(self) -> set[str]:
        """The keys of all tensors of the checkpoint."""
        return set(self._chunks)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a whole tensor."""
        return self._chunks[key][0].shape

    def dtype(self, key: str) -> torch.dtype:
        """Dtype of a tensor."""
        return getattr(torch, self._chunks[key][0].dtype)

    def byte_ranges(self, key: str, index: int | None, first_row: int, num_rows: int) -> list[ByteRange] | None:
        """The bytes of some rows of a tensor, where they lie in whole rows in its chunks; else None.

        Args:
            key: The tensor.
            index: Index in its first dimension, of a stack of experts; None where the rows are the first dimension.
            first_row: First of the rows.
            num_rows: How many.
        """
        found: list[ByteRange] = []
        row = first_row
        while row < first_row + num_rows:
            chunk = self._chunk_at(key, index, row, 0)
            rows = self._rows(chunk, index)
            width = chunk.shape[len(chunk.shape) - 1] if rows.ndim == 2 else 1
            if rows.ndim == 2 and chunk.sizes[-1] != width:
                return None
            count = min(first_row + num_rows, rows.first + rows.count) - row
            found.append(rows.byte_range(row, count))
            row += count
        return found

    def read(self, key: str, index: int | None, first_row: int, num_rows: int) -> torch.Tensor:
        """Read some rows of a tensor, in memory of their own; arguments are those of `byte_ranges`.

        Raises:
            CheckpointError: a file cannot be read or has been cut.
        """
        shape = self.shape(key)[1:] if index is not None else self.shape(key)
        result = torch.empty((num_rows, *shape[1:]), dtype=self.dtype(key))
        whole = self.byte_ranges(key, index, first_row, num_rows)
        if whole is not None:
            read_byte_ranges(whole, result.view(-1).view(torch.uint8), key)
            return result
        row = first_row
        while row < first_row + num_rows:
            column, count = 0, num_rows
            while column < shape[1]:
                chunk = self._chunk_at(key, index, row, column)
                rows, width = self._rows(chunk, index), chunk.sizes[-1]
                count = min(first_row + num_rows, rows.first + rows.count) - row
                part = torch.empty((count, width), dtype=result.dtype)
                read_byte_ranges([rows.byte_range(row, count)], part.view(-1).view(torch.uint8), key)
                top = row - first_row
                result[top: top + count, column: column + width] = part
                column += width
            row += count
        return result

    def _chunk_at(self, key: str, index: int | None, row: int, column: int) -> TensorPart:
        """The chunk that holds the element [index, row, column], of as many as the tensor has dimensions."""
        shape = self.shape(key)
        point = (*(() if index is None else (index,)), row, column)[: len(shape)]
        begins_here = self._by_offsets.get((key, point))
        for chunk in [begins_here] if begins_here else self._chunks[key]:
            if all(low <= at < low + size for low, size, at in zip(chunk.offsets, chunk.sizes, point, strict=True)):
                return chunk
        raise CheckpointError(f"checkpoint {self.folder} is truncated or corrupt: {key} has no value at {list(point)}")

    def _start(self, chunk: TensorPart) -> int:
        """First byte of a chunk's values in its file."""
        place = chunk.file, chunk.start
        if place not in self._starts:
            try:
                start, sizes, dtype = self._values(chunk)
            except READ_ERRORS as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise CheckpointError(f"checkpoint {self.folder} is truncated or corrupt: {chunk.key} in {chunk.file}: "
                                      f"{reason}") from error
            if sizes != chunk.sizes or dtype != chunk.dtype:
                raise CheckpointError(
                    f"checkpoint {self.folder} is corrupt: {chunk.file} has {dtype} {list(sizes)} where the index has "
                    f"{chunk.key}, {chunk.dtype} {list(chunk.sizes)}")
            self._starts[place] = start
        return self._starts[place]

    def _values(self, chunk: TensorPart) -> tuple[int, tuple[int, ...], str]:
        """First byte of a chunk's values in its file, its shape and its dtype; the values are proved when read."""
        path = self.folder / chunk.file
        with open(path, "rb", buffering=0) as stream:
            stream.seek(chunk.start)
            frame = known_frame(getattr(torch, chunk.dtype), chunk.sizes, chunk.length, stream.read)
        if frame is not None:
            return chunk.start + len(frame.head), chunk.sizes, chunk.dtype
        around = min(chunk.length, _FRAME_BYTES)
        for start in (chunk.start, chunk.start + chunk.length - around):
            self._files.require(chunk.file, start, around)
        return _values(path, chunk.start, chunk.length)

    def _rows(self, chunk: TensorPart, index: int | None) -> _Rows:
        start = self._start(chunk)
        inner = chunk.sizes if index is None else chunk.sizes[1:]
        row_bytes = chunk.num_bytes // max(1, torch.Size(chunk.sizes).numel() // torch.Size(inner[1:]).numel())
        if index is not None:
            start += (index - chunk.offsets[0]) * inner[0] * row_bytes
        return _Rows(self.folder / chunk.file, start, chunk.offsets[len(chunk.offsets) - len(inner)], inner[0],
                     row_bytes, len(inner), self._files.verifiers.get(chunk.file))


@dataclass(frozen=True)
class _Rows:
    """The rows of a chunk, or of one matrix in it: `count` of them from row `first` of the tensor on."""

    file: Path
    start: int
    first: int
    count: int
    row_bytes: int
    ndim: int
    verifier: BlockVerifier | None

    def byte_range(self, row: int, count: int) -> ByteRange:
        start = self.start + (row - self.first) * self.row_bytes
        return ByteRange(self.file, start, count * self.row_bytes, self.verifier)


class _Slice(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, stream: io.BufferedReader, start: int, length: int) -> None:
        super().__init__()
        self._stream, self._start, self._length, self._position = stream, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        self._stream.seek(self._start + self._position)
        count = self._stream.readinto(view[: max(0, self._length - self._position)])
        self._position += count
        return count


def _values(path: Path, start: int, length: int) -> tuple[int, tuple[int, ...], str]:
    """Find where the values of a saved tensor begin in a file, its shape and its dtype; the values are not read."""
    with open(path, "rb") as stream:
        entry: Any = _Slice(stream, start, length)
        with torch.serialization.skip_data():
            tensor = load_tensors(entry)
        if not tensor.is_contiguous() or tensor.storage_offset():
            raise ValueError("it is not stored row by row")
        entry.seek(0)
        reader: Any = torch._C.PyTorchFileReader(entry)
        offset = reader.get_record_offset("data/0")
    return start + offset, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
