"""Tokens on disk: Megatron-Core's .bin/.idx pair, written with numpy alone, and a sidecar that says where it came from.

The two files are byte for byte those of megatron.core.datasets.indexed_dataset.IndexedDatasetBuilder (0.19), so any
Megatron-style reader takes them. Layout of PREFIX.idx, little-endian:

    9 bytes "MMIDIDX\\0\\0" | uint64 version 1 | uint8 dtype code | uint64 sequences n | uint64 document boundaries d
    int32 [n] tokens per sequence | int64 [n] byte offset of each in PREFIX.bin | int64 [d] first sequence of each
    document, then n

PREFIX.bin holds the ids, nothing else. A document here is one sequence, or none if it has no tokens. PREFIX.json, the
sidecar, is ours; other readers ignore it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import IO, Any

import numpy as np

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
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
_CODE_OF_DTYPE = {dtype: code for code, dtype in _DTYPE_CODES.items()}
_MAX_UINT16_VOCAB_SIZE = 65500  # Megatron-Core's limit, exclusive
SIDECAR_VERSION = 1


def choose_dtype(vocab_size: int) -> np.dtype:
    """The dtype Megatron-Core gives to a vocabulary of this size: uint16 below 65500, else int32."""
    return np.dtype(np.uint16) if vocab_size < _MAX_UINT16_VOCAB_SIZE else np.dtype(np.int32)


@dataclass(frozen=True)
class Sidecar:
    """Content of PREFIX.json. `max_token_id` is -1 for a dataset without tokens; hashes are of the whole files."""

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
    version: int = SIDECAR_VERSION


def dataset_paths(prefix: str | os.PathLike[str]) -> tuple[str, str, str]:
    """(PREFIX.bin, PREFIX.idx, PREFIX.json)."""
    prefix = os.fspath(prefix)
    return f"{prefix}.bin", f"{prefix}.idx", f"{prefix}.json"


class DatasetWriter:
    """Writes one dataset; use as a context manager, which publishes on success and leaves nothing on an error.

    Everything goes to temporary names beside the final ones and is renamed at the end, .bin first, then .idx, then the
    sidecar. A dataset that is being replaced loses its sidecar and .idx first, so that a machine which dies in between
    leaves a pair that no reader opens rather than files of two datasets.

    Args:
        prefix: Path without suffix; its folder is created if missing.
        vocab_size: Largest id + 1; decides the dtype and bounds the ids.
        tokenizer_fingerprint: From `tokenizer.fingerprint`.
        options: How the data was made (JSON values), for the sidecar.
        is_overwrite_allowed: Replace a dataset of that name.

    Raises:
        ValueError: vocab_size is not positive, or the dataset exists and may not be replaced.
    """

    def __init__(
        self,
        prefix: str | os.PathLike[str],
        *,
        vocab_size: int,
        tokenizer_fingerprint: str = "",
        options: dict[str, Any] | None = None,
        is_overwrite_allowed: bool = False,
    ) -> None:
        if not 0 < vocab_size <= 2**31:
            raise ValueError(f"vocab_size={vocab_size} must lie in 1..{2**31}: ids are stored as uint16 or int32")
        self.prefix = os.fspath(prefix)
        self.vocab_size = vocab_size
        self.dtype = choose_dtype(vocab_size)
        self._tokenizer_fingerprint = tokenizer_fingerprint
        self._options = dict(options or {})
        self._paths = dataset_paths(prefix)
        existing = [path for path in self._paths if os.path.exists(path)]
        if existing and not is_overwrite_allowed:
            raise ValueError(f"output {existing[0]} exists: pass --overwrite to replace it, or another --output-prefix")
        self._temporary = tuple(f"{path}.tmp-{os.getpid()}" for path in self._paths)
        self._lengths: list[np.ndarray] = []
        self._document_ends: list[np.ndarray] = []
        self._num_sequences = 0
        self._max_token_id = -1
        self._bin_sha256 = hashlib.sha256()
        self._bin_file: IO[bytes] | None = None
        self.num_documents = 0
        self.num_tokens = 0
        os.makedirs(os.path.dirname(self._paths[0]) or ".", exist_ok=True)
        self._bin_file = open(self._temporary[0], "wb")

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.finalize()
        else:
            self.abort()

    def add_documents(self, ids_T: np.ndarray, lengths_D: np.ndarray) -> None:
        """Append documents given as flat ids [T] and one length each [D], sum T.

        Raises:
            ValueError: an id outside 0..vocab_size - 1; names the document (counted from 0 over the dataset).
        """
        assert self._bin_file is not None, "the dataset is finished"
        ids_T, lengths_D = np.asarray(ids_T), np.asarray(lengths_D, dtype=np.int64)
        assert ids_T.ndim == 1 and lengths_D.ndim == 1 and int(lengths_D.sum()) == ids_T.size
        if ids_T.size:
            smallest, largest = int(ids_T.min()), int(ids_T.max())
            if smallest < 0 or largest >= self.vocab_size:
                self._refuse_id(ids_T, lengths_D)
            self._max_token_id = max(self._max_token_id, largest)
        longest = int(lengths_D.max(initial=0))
        if longest > np.iinfo(np.int32).max:
            raise ValueError(f"{self.prefix}: a document of {longest} tokens; lengths are int32, split the document")
        data = ids_T.astype(self.dtype).tobytes()
        self._bin_sha256.update(data)
        self._bin_file.write(data)
        has_tokens_D = lengths_D > 0
        self._document_ends.append(self._num_sequences + np.cumsum(has_tokens_D, dtype=np.int64))
        self._lengths.append(lengths_D[has_tokens_D].astype(np.int32))
        self._num_sequences += int(has_tokens_D.sum())
        self.num_documents += lengths_D.size
        self.num_tokens += ids_T.size

    def _refuse_id(self, ids_T: np.ndarray, lengths_D: np.ndarray) -> None:
        position = int(np.flatnonzero((ids_T < 0) | (ids_T >= self.vocab_size))[0])
        document = self.num_documents + int(np.searchsorted(np.cumsum(lengths_D), position, side="right"))
        raise ValueError(
            f"{self.prefix}: token id {int(ids_T[position])} of document {document} does not fit: ids must lie in "
            f"0..{self.vocab_size - 1} (vocab_size={self.vocab_size}, stored as {self.dtype.name}); use the tokenizer "
            "that made the ids"
        )

    def _write_idx(self, path: str) -> str:
        lengths = np.concatenate([np.empty(0, np.int32), *self._lengths])
        offsets = np.zeros(lengths.size, dtype=np.int64)
        np.cumsum(lengths[:-1], dtype=np.int64, out=offsets[1:])
        boundaries = np.concatenate([np.zeros(1, np.int64), *self._document_ends])
        header = _HEADER.pack(_MAGIC, 1, _CODE_OF_DTYPE[self.dtype], lengths.size, boundaries.size)
        digest = hashlib.sha256()
        with open(path, "wb") as stream:
            for part in (header, lengths.tobytes(), (offsets * self.dtype.itemsize).tobytes(), boundaries.tobytes()):
                digest.update(part)
                stream.write(part)
            _flush_to_disk(stream)
        return digest.hexdigest()

    def finalize(self) -> Sidecar:
        """Write the index and the sidecar, put all three under their names, and return the sidecar.

        On any error everything of this dataset is removed, and the error is raised.
        """
        assert self._bin_file is not None, "the dataset is finished"
        published: list[str] = []
        try:
            _flush_to_disk(self._bin_file)
            self._bin_file.close()
            sidecar = Sidecar(
                tokenizer_fingerprint=self._tokenizer_fingerprint,
                vocab_size=self.vocab_size,
                dtype=self.dtype.name,
                num_documents=self.num_documents,
                num_sequences=self._num_sequences,
                num_tokens=self.num_tokens,
                max_token_id=self._max_token_id,
                bin_sha256=self._bin_sha256.hexdigest(),
                idx_sha256=self._write_idx(self._temporary[1]),
                options=self._options,
            )
            with open(self._temporary[2], "w", encoding="utf-8") as stream:
                stream.write(json.dumps(asdict(sidecar), indent=2, ensure_ascii=False) + "\n")
                _flush_to_disk(stream)
            for path in (self._paths[2], self._paths[1]):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
            for temporary, path in zip(self._temporary, self._paths, strict=True):
                os.replace(temporary, path)
                published.append(path)
        except BaseException:
            self.abort()
            for path in published:
                os.unlink(path)
            raise
        self._bin_file = None
        return sidecar

    def abort(self) -> None:
        """Drop what was written; the final names are untouched."""
        if self._bin_file is not None:
            self._bin_file.close()
            self._bin_file = None
        for path in self._temporary:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


def _flush_to_disk(stream: IO[Any]) -> None:
    stream.flush()
    os.fsync(stream.fileno())


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
                "make it with: python tools/preprocess_data.py --input FILE.jsonl --tokenizer-type HuggingFaceTokenizer"
                " --tokenizer-model DIR --append-eod --workers 2 --output-prefix PREFIX, which writes "
                "PREFIX_text_document.bin and .idx"
            )
    way_out = "make it again with tools/preprocess_data.py"
    with open(idx_path, "rb") as stream:
        raw = stream.read(_HEADER.size)
        if len(raw) < _HEADER.size or not raw.startswith(_MAGIC):
            raise ValueError(f"{idx_path} is not a Megatron-Core index (wrong magic bytes); {way_out}")
        _, version, code, num_sequences, num_boundaries = _HEADER.unpack(raw)
        if version != 1 or code not in _DTYPE_CODES:
            raise ValueError(f"{idx_path} has version {version} and dtype code {code}, not 1 and 1..8; {way_out}")
        dtype = _DTYPE_CODES[code]
        wanted = _HEADER.size + 12 * num_sequences + 8 * num_boundaries
        actual = os.path.getsize(idx_path)
        # Multimodal datasets append one mode byte per sequence.
        if num_boundaries < 1 or actual not in (wanted, wanted + num_sequences):
            raise ValueError(f"{idx_path} has {actual} bytes, its header says {wanted}; {way_out}")
        num_tokens = 0
        if num_sequences:
            stream.seek(_HEADER.size + 4 * (num_sequences - 1))
            (last_length,) = struct.unpack("<i", stream.read(4))
            stream.seek(_HEADER.size + 12 * num_sequences - 8)
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
        with open(path, encoding="utf-8") as stream:
            content = json.load(stream)
        if content.get("version") != SIDECAR_VERSION:
            raise ValueError(f"version {content.get('version')}, this release reads {SIDECAR_VERSION}")
        return Sidecar(**content)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a dataset's sidecar ({error}): make the dataset again") from error
