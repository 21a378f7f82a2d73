"""A safetensors file read by position: its header checked against its size, its tensors read into plain memory.

The safetensors package maps whole files; a conversion that must stay within a bound reads what it needs, when it
needs it, into memory that it frees. The header is JSON: dtype, shape and byte range of each tensor by name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeGuard

import torch

from dsv3_megatron.checkpoint.byte_ranges import ByteRange, read_byte_ranges
from dsv3_megatron.checkpoint.folder import CheckpointError
from dsv3_megatron.config.json_files import object_without_repeats, parse_json
from dsv3_megatron.config.output import json_text
from dsv3_megatron.data.checksums import BlockVerifier, DamagedFileError
from dsv3_megatron.data.folder_checksums import refusal

SUFFIX, SINGLE = ".safetensors", "model.safetensors"
WEIGHT_DTYPES = (torch.bfloat16, torch.float32, torch.float8_e4m3fn)
# Those of weights, and others in which a table beside them may be.
DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn, "F16": torch.float16,
          "F64": torch.float64}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000
_MAX_AXES = 64


@dataclass(frozen=True)
class StoredTensor:
    """Place of a tensor's bytes in a safetensors file, with its dtype and shape.

    Attributes:
        name: Name of the tensor in the file.
        dtype: Dtype of the values, one of `DTYPES`.
        shape: Lengths of the tensor's axes.
        file: The file.
        offset: First byte in the file.
        num_bytes: Bytes that the values take.
        verifier: Proves the bytes before they are used; None where nobody knows their checksums.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    num_bytes: int
    verifier: BlockVerifier | None = field(default=None, compare=False, repr=False)

    def byte_range(self, first_row: int = 0, num_rows: int | None = None) -> ByteRange:
        """The bytes of the tensor, or of some of its rows."""
        rows = self.shape[0] - first_row if num_rows is None else num_rows
        row_bytes = self.num_bytes // self.shape[0] if self.shape[0] else 0
        return ByteRange(self.file, self.offset + first_row * row_bytes, rows * row_bytes, self.verifier)

    def read(self, first_row: int = 0, num_rows: int | None = None) -> torch.Tensor:
        """The tensor, or some of its rows, in memory of its own.

        Raises:
            CheckpointError: the file cannot be read or has been cut.
        """
        rows = self.shape[0] - first_row if num_rows is None else num_rows
        where = self.byte_range(first_row, rows)
        raw = torch.empty(where.num_bytes, dtype=torch.uint8)
        read_byte_ranges([where], raw, self.name)
        return raw.view(self.dtype).view(rows, *self.shape[1:])


def read_header_text(file: Path, verifier: BlockVerifier | None = None) -> str:
    """A file's header as it is, padding included, proved first where there is a verifier.

    Raises:
        CheckpointError: the file is missing, cut before the header's end, or no safetensors file.
    """
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            prefix = stream.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > _MAX_HEADER_BYTES:
                raise CheckpointError(f"{file} is not a safetensors file: its first 8 bytes are no header's length")
            if verifier is not None:
                verifier.require(0, 8 + length)
            text = stream.read(length)
    except DamagedFileError as error:
        raise CheckpointError(refusal(file, error)) from error
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    if len(text) < length:
        raise CheckpointError(f"{file} is truncated: it has {size:,} bytes, its header alone takes {8 + length:,}; get "
                              "it again")
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file} is not a safetensors file: its header cannot be read ({error})") from error


def read_header(file: Path, verifier: BlockVerifier | None = None) -> dict[str, StoredTensor]:
    """The tensors of a file, by name; the file must be as long as they say.

    Args:
        file: The file.
        verifier: Proves the header now, and the tensors when they are read; None: nobody knows their checksums.

    Raises:
        CheckpointError: the file is missing, truncated, or no safetensors file, or a tensor has a dtype that this
            library does not read.
    """
    text = read_header_text(file, verifier)
    start = 8 + len(text.encode("utf-8"))
    try:
        header = parse_json(text, object_pairs_hook=object_without_repeats)
        entries = {name: replace(_entry(name, value, file, start), verifier=verifier)
                   for name, value in header.items() if name != "__metadata__"}
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{file} is not a safetensors file: its header cannot be read ({error})") from error
    _check_coverage(file, file.stat().st_size, start, list(entries.values()))
    return entries


def header_bytes(tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]]) -> tuple[bytes, dict[str, int]]:
    """The start of a file that will hold these tensors one after the other, and each one's position in it.

    Args:
        tensors: Name, dtype and shape, in the order in which their bytes will follow.
    """
    content: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position, relative = 0, {}
    for name, dtype, shape in tensors:
        num_bytes = dtype.itemsize * math.prod(shape)
        content[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [position, position + num_bytes]}
        relative[name] = position
        position += num_bytes
    text = json_text(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: start + offset for name, offset in relative.items()}


def _entry(name: str, value: dict[str, object], file: Path, start: int) -> StoredTensor:
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if dtype not in DTYPES:
        raise CheckpointError(f"{file}: tensor {name} is {dtype}; this library reads "
                              f"{', '.join(NAMES[dtype] for dtype in WEIGHT_DTYPES)}")
    if not _are_lengths(shape) or not _are_lengths(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{file}: tensor {name} has shape {json_text(shape)[:100]} and data_offsets "
                              f"{json_text(offsets)[:100]}; both must be lists of whole numbers, none negative")
    begin, end = offsets
    torch_dtype = DTYPES[str(dtype)]
    expected = torch_dtype.itemsize * math.prod(shape)
    if end - begin != expected or begin < 0:
        raise CheckpointError(f"{file}: tensor {name} of {dtype} {shape} takes {expected:,} bytes, the header gives it "
                              f"{end - begin:,}")
    return StoredTensor(name, torch_dtype, tuple(map(int, shape)), file, start + begin, expected)


def _are_lengths(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and len(value) <= _MAX_AXES and all(
        type(entry) is int and 0 <= entry < 1 << 62 for entry in value)


def _check_coverage(file: Path, size: int, start: int, entries: list[StoredTensor]) -> None:
    """Tensors must follow one another without gap or overlap up to the file's end."""
    position = start
    for entry in sorted(entries, key=lambda entry: (entry.offset, entry.num_bytes)):
        if entry.offset + entry.num_bytes > size:
            raise CheckpointError(f"{file} is truncated: tensor {entry.name} ends at byte "
                                  f"{entry.offset + entry.num_bytes:,}, the file at {size:,}; get it again")
        if entry.offset != position:
            raise CheckpointError(f"{file}: tensor {entry.name} begins at byte {entry.offset:,}, the one before ends "
                                  f"at {position:,}: the header is wrong")
        position += entry.num_bytes
    if position != size:
        raise CheckpointError(f"{file} has {size:,} bytes, its tensors end at {position:,}: the header is wrong")
