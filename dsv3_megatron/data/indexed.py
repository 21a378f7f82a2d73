"""Tokens on disk: the format of Megatron-Core's .bin/.idx pair, and a sidecar that says where a dataset came from.

The two files are those of megatron.core.datasets.indexed_dataset.IndexedDatasetBuilder (0.19), so any Megatron-style
reader takes them; `indexed_writer.py` writes them. Layout of PREFIX.idx, little-endian:

    9 bytes "MMIDIDX\\0\\0" | uint64 version 1 | uint8 dtype code | uint64 sequences n | uint64 document boundaries d
    int32 [n] tokens per sequence | int64 [n] byte offset of each in PREFIX.bin | int64 [d] first sequence of each
    document, then n

PREFIX.bin holds the ids, nothing else. A document is one sequence, none if it has no tokens, or one for each of its
sentences. PREFIX.json, the sidecar, is ours, and so are the checksums in PREFIX.sums (proved_tokens.py); other readers
ignore both.
"""

from __future__ import annotations

import itertools
import os
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from dsv3_megatron.config.json_files import read_json
from dsv3_megatron.config.output import json_text
from dsv3_megatron.data.signed_json import with_signature, without_signature

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
_DTYPE_CODES: dict[int, np.dtype] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int8),
    3: np.dtype(np.int16),
    4: np.dtype(np.int32),
    5: np.dtype(np.int64),
    6: np.dtype(np.float64),
    7: np.dtype(np.float32),
    8: np.dtype(np.uint16),
}
CODE_OF_DTYPE = {dtype: code for code, dtype in _DTYPE_CODES.items()}
_MAX_UINT16_VOCAB_SIZE = 65500  # Megatron-Core's limit, exclusive
SIDECAR_VERSION = 2  # 1 had no signature
_SIGNATURE = "signature"
_READ_BYTES = 8 << 20
_CHECKED_AT_A_TIME = 1 << 20


def choose_dtype(vocab_size: int) -> np.dtype:
    """The dtype Megatron-Core gives to a vocabulary of this size: uint16 below 65500, else int32."""
    return np.dtype(np.uint16) if vocab_size < _MAX_UINT16_VOCAB_SIZE else np.dtype(np.int32)


@dataclass(frozen=True)
class Sidecar:
    """Content of a dataset's PREFIX.json.

    `max_token_id` is -1 for a dataset without tokens; hashes are of the whole files. `options` say how the data was
    made, `counts` what became of the input (documents read, empty, rejected and why, bytes of text). `sums_algorithm`
    is that of the checksums in PREFIX.sums; `idx_checksum`, "ALGORITHM:DIGITS", is of the index, and quicker to compare
    than its hash; "" where there are none.
    """

    tokenizer_fingerprint: str
    vocab_size: int
    dtype: str
    num_documents: int
    num_sequences: int
    num_tokens: int
    max_token_id: int
    bin_sha256: str
    idx_sha256: str
    options: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, Any] = field(default_factory=dict)
    sums_algorithm: str = ""
    idx_checksum: str = ""
    version: int = SIDECAR_VERSION

    def as_text(self) -> str:
        """The file's text, signed."""
        return json_text(with_signature(asdict(self), _SIGNATURE), indent=2, ensure_ascii=False) + "\n"


def dataset_paths(prefix: str | os.PathLike[str]) -> tuple[str, str, str]:
    """The paths of a dataset's files: (PREFIX.bin, PREFIX.idx, PREFIX.json)."""
    prefix = os.fspath(prefix)
    return f"{prefix}.bin", f"{prefix}.idx", f"{prefix}.json"


def sums_path(prefix: str | os.PathLike[str]) -> str:
    """The path of the checksums of a dataset's tokens: PREFIX.sums."""
    return f"{os.fspath(prefix)}.sums"


@dataclass(frozen=True)
class IndexHeader:
    """What the first bytes of PREFIX.idx say, and the token count of PREFIX.bin."""

    dtype: np.dtype
    num_sequences: int
    num_documents: int
    num_tokens: int


def read_header(prefix: str | os.PathLike[str]) -> IndexHeader:
    """Read and check the index's header against the sizes of both files; reads no tokens.

    Raises:
        ValueError: a file is missing, is no Megatron-Core dataset, or is shorter or longer than the header says.
    """
    bin_path, idx_path, _ = dataset_paths(prefix)
    for path in (idx_path, bin_path):
        if not os.path.isfile(path):
            raise ValueError(
                f"data file {path} does not exist (data_path={os.fspath(prefix)}: the prefix, without .bin or .idx); "
                "make it with: dsv3 preprocess --input FILE.jsonl --tokenizer-type HuggingFaceTokenizer"
                " --tokenizer-model DIR --append-eod --workers 2 --output-prefix PREFIX, which writes "
                "PREFIX_text_document.bin and .idx"
            )
    way_out = "make it again with dsv3 preprocess"
    with open(idx_path, "rb") as stream:
        raw = stream.read(HEADER.size)
        if len(raw) < HEADER.size or not raw.startswith(MAGIC):
            raise ValueError(f"{idx_path} is not a Megatron-Core index (wrong magic bytes); {way_out}")
        _, version, code, num_sequences, num_boundaries = HEADER.unpack(raw)
        if version != 1 or code not in _DTYPE_CODES:
            raise ValueError(f"{idx_path} has version {version} and dtype code {code}, not 1 and 1..8; {way_out}")
        dtype = _DTYPE_CODES[code]
        wanted = HEADER.size + 12 * num_sequences + 8 * num_boundaries
        actual = os.path.getsize(idx_path)
        # Multimodal datasets append one mode byte per sequence.
        if num_boundaries < 1 or actual not in (wanted, wanted + num_sequences):
            raise ValueError(f"{idx_path} has {actual} bytes, its header says {wanted}; {way_out}")
        num_tokens = 0
        if num_sequences:
            stream.seek(HEADER.size + 4 * (num_sequences - 1))
            (last_length,) = struct.unpack("<i", stream.read(4))
            stream.seek(HEADER.size + 12 * num_sequences - 8)
            (last_offset,) = struct.unpack("<q", stream.read(8))
            num_tokens = last_offset // dtype.itemsize + last_length
    if os.path.getsize(bin_path) != num_tokens * dtype.itemsize:
        raise ValueError(
            f"{bin_path} has {os.path.getsize(bin_path)} bytes, its index says {num_tokens * dtype.itemsize} "
            f"({num_tokens} tokens of {dtype.name}); the two files belong to different datasets: {way_out}"
        )
    return IndexHeader(dtype, num_sequences, num_boundaries - 1, num_tokens)


def read_sidecar(prefix: str | os.PathLike[str]) -> Sidecar | None:
    """The sidecar of a dataset; None where there is none (a dataset that another tool wrote).

    Raises:
        ValueError: the file is there but unreadable, or of another version.
    """
    path = dataset_paths(prefix)[2]
    if not os.path.isfile(path):
        return None
    try:
        content = read_json(path)
        version = content.get("version")
        if version not in (1, SIDECAR_VERSION):
            raise ValueError(f"version {version!r}, this release reads 1 and {SIDECAR_VERSION}")
        sidecar = Sidecar(**(without_signature(content, _SIGNATURE) if version != 1 else content))
        for item in fields(Sidecar):
            kind = {"str": str, "int": int}.get(str(item.type), dict)
            if type(getattr(sidecar, item.name)) is not kind:
                raise ValueError(f"{item.name}={getattr(sidecar, item.name)!r} is no {kind.__name__}")
        return sidecar
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a dataset's sidecar ({error}): make the dataset again") from error


@dataclass(frozen=True)
class IndexArrays:
    """The arrays of an index, memory-mapped. Q sequences, D documents.

    Attributes:
        lengths_Q: int32, tokens of each sequence.
        offsets_Q: int64, first byte of each in the .bin file.
        boundaries_D1: int64 [D + 1], first sequence of each document, then Q.
    """

    lengths_Q: np.ndarray
    offsets_Q: np.ndarray
    boundaries_D1: np.ndarray


def map_index(prefix: str | os.PathLike[str]) -> IndexArrays:
    """Map a dataset's index into memory.

    Raises:
        ValueError: the index is missing or damaged, as for `read_header`.
    """
    header = read_header(prefix)
    raw = np.memmap(dataset_paths(prefix)[1], dtype=np.uint8, mode="r")
    ends = np.cumsum([HEADER.size, 4 * header.num_sequences, 8 * header.num_sequences, 8 * (header.num_documents + 1)])
    parts = [raw[start:end] for start, end in itertools.pairwise(ends.tolist())]
    return IndexArrays(parts[0].view(np.int32), parts[1].view(np.int64), parts[2].view(np.int64))


def check_index(prefix: str | os.PathLike[str]) -> None:
    """Check every number of a dataset's index: each sequence lies in the .bin file, each document in the sequences.

    Raises:
        ValueError: one does not; names it.
    """
    header, index = read_header(prefix), map_index(prefix)
    bin_path, idx_path, _ = dataset_paths(prefix)
    itemsize, num_bytes = header.dtype.itemsize, os.path.getsize(bin_path)
    way_out = "the index is damaged, or of other data: make it again with dsv3 preprocess"
    for start in range(0, header.num_sequences, _CHECKED_AT_A_TIME):
        lengths = index.lengths_Q[start: start + _CHECKED_AT_A_TIME]
        offsets = index.offsets_Q[start: start + _CHECKED_AT_A_TIME]
        if _are_adjacent(lengths, offsets, itemsize, num_bytes):
            continue
        lengths = lengths.astype(np.int64)
        # An offset of more than the file's size is found before it is added to.
        wrong = np.flatnonzero((lengths < 0) | (offsets < 0) | (offsets > num_bytes) | (offsets % itemsize != 0)
                               | (lengths * itemsize > num_bytes - np.minimum(offsets, num_bytes)))
        if wrong.size:
            at = int(wrong[0])
            raise ValueError(f"{idx_path}: sequence {start + at} has {lengths[at]} tokens from byte {offsets[at]} on, "
                             f"which do not lie in {bin_path} ({num_bytes} bytes of {header.dtype.name}); {way_out}")
    bounds = index.boundaries_D1
    if bounds[0] != 0 or bounds[-1] != header.num_sequences:
        raise ValueError(f"{idx_path}: documents run from sequence {bounds[0]} to {bounds[-1]}, not 0 to "
                         f"{header.num_sequences}; {way_out}")
    for start in range(0, bounds.size, _CHECKED_AT_A_TIME):
        part = bounds[start: start + _CHECKED_AT_A_TIME + 1]
        falls = part[1:] < part[:-1]
        if falls.any():
            raise ValueError(f"{idx_path}: document {start + int(falls.argmax())} ends before it begins; {way_out}")


def _are_adjacent(lengths: np.ndarray, offsets: np.ndarray, itemsize: int, num_bytes: int) -> bool:
    """Whether sequences lie one behind the other in the .bin file, as a writer puts them; a quick look at them all."""
    first, end = int(offsets[0]), int(offsets[-1]) + int(lengths[-1]) * itemsize
    if lengths.min() < 0 or first < 0 or first % itemsize or end > num_bytes:
        return False
    # No sum is larger than 2^20 lengths of 2^31 items of 8 bytes.
    ends = np.cumsum(lengths, dtype=np.int64)
    ends *= itemsize
    ends += first
    return bool(int(ends[-1]) == end and np.array_equal(ends[:-1], offsets[1:]))


def read_chunks(path: str) -> Iterator[bytes]:
    """The bytes of a file, a few megabytes at a time, each chunk but the last a whole number of ids or offsets."""
    with open(path, "rb") as stream:
        while chunk := stream.read(_READ_BYTES):
            yield chunk
