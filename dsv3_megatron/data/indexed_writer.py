"""Writes .bin/.idx datasets in constant memory, so that a run that was cut short can go on.

While a dataset grows it lives in a folder of its own as three plain files: NAME.bin (ids), NAME.lengths (int32, tokens
of each sequence) and NAME.documents (int32, sequences of each document). They only ever grow, so a `WriterState` (four
numbers and a hash) is enough to cut them back to a moment and go on from there; the checksums in NAME.sums are then
made anew. `complete` turns them into the final .idx and sidecar, still in the folder; `publish` renames everything into
place.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import IO, Any

import numpy as np

from dsv3_megatron.data.checksums import ALGORITHM, RunningChecksum
from dsv3_megatron.data.contents import require_index
from dsv3_megatron.data.indexed import (
    CODE_OF_DTYPE,
    HEADER,
    MAGIC,
    Sidecar,
    choose_dtype,
    dataset_paths,
    map_index,
    read_chunks,
    read_header,
    read_sidecar,
    sums_path,
)
from dsv3_megatron.data.proved_tokens import BlockSums, ProvedTokens

_CHUNK_BYTES = 8 << 20
_MAX_LENGTH = np.iinfo(np.int32).max
_GROWING = ("bin", "lengths", "documents")  # suffixes: ids, tokens of each sequence, sequences of each document


@dataclass(frozen=True)
class WriterState:
    """What has been written so far; the hashes are of the bytes of ids, of lengths and of documents."""

    num_documents: int = 0
    num_sequences: int = 0
    num_tokens: int = 0
    max_token_id: int = -1
    bin_sha256: str = hashlib.sha256().hexdigest()
    lengths_sha256: str = hashlib.sha256().hexdigest()
    documents_sha256: str = hashlib.sha256().hexdigest()


def refuse_existing(prefix: str, *, is_overwrite_allowed: bool) -> None:
    """Refuse to replace a dataset by accident.

    Raises:
        ValueError: one of its three files exists and may not be replaced.
    """
    existing = [path for path in dataset_paths(prefix) if os.path.exists(path)]
    if existing and not is_overwrite_allowed:
        raise ValueError(f"output {existing[0]} exists: pass --overwrite to replace it, or another --output-prefix")


class DatasetWriter:
    """Writes one dataset; as a context manager it publishes on success and leaves nothing on an error.

    Args:
        prefix: Path of the dataset without suffix; its folder is created if missing.
        vocab_size: Largest id + 1; bounds the ids.
        dtype: Dtype of the ids; None takes Megatron-Core's choice for the vocabulary.
        tokenizer_fingerprint: Fingerprint of the tokenizer (`tokenizer.fingerprint`), for the sidecar.
        options: How the data was made (JSON values), for the sidecar.
        is_overwrite_allowed: Replace a dataset of that name.
        folder: Folder in which the dataset grows, on the prefix's file system. None: PREFIX.unfinished.
        state: Go on from here; the files beyond it are cut off.

    Raises:
        ValueError: vocab_size is out of range, the dataset exists and may not be replaced, or the files in the folder
            are not those of `state`.
    """

    def __init__(
        self,
        prefix: str | os.PathLike[str],
        *,
        vocab_size: int,
        dtype: np.dtype | None = None,
        tokenizer_fingerprint: str = "",
        options: dict[str, Any] | None = None,
        is_overwrite_allowed: bool = False,
        folder: str | None = None,
        state: WriterState | None = None,
    ) -> None:
        if not 0 < vocab_size <= 2**31:
            raise ValueError(f"vocab_size={vocab_size} must lie in 1..{2**31}: ids are stored as uint16 or int32")
        self.prefix = os.fspath(prefix)
        self.vocab_size = vocab_size
        self.dtype = choose_dtype(vocab_size) if dtype is None else dtype
        self._tokenizer_fingerprint = tokenizer_fingerprint
        self._options = dict(options or {})
        self.counts: dict[str, Any] = {}
        refuse_existing(self.prefix, is_overwrite_allowed=is_overwrite_allowed)
        self.folder = f"{self.prefix}.unfinished" if folder is None else folder
        os.makedirs(self.folder, exist_ok=True)
        self._base = os.path.join(self.folder, os.path.basename(self.prefix))
        self._files: list[IO[bytes]] = []
        self._hashes = {suffix: hashlib.sha256() for suffix in _GROWING}
        self._sums = BlockSums(ALGORITHM)
        self._sums_file: IO[bytes] = open(f"{self._base}.sums", "wb")  # made anew from the ids, which are read anyway
        self._state = state or WriterState()
        self._restore(self._state)

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.complete()
                publish(self.folder, self.prefix)
        finally:
            self.close()
            shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def num_documents(self) -> int:
        """Number of documents written so far."""
        return self._state.num_documents

    @property
    def num_tokens(self) -> int:
        """Number of tokens written so far."""
        return self._state.num_tokens

    def state(self) -> WriterState:
        """This moment, with everything before it handed to the operating system."""
        for file in self._files:
            file.flush()
        hashes = {f"{suffix}_sha256": found.hexdigest() for suffix, found in self._hashes.items()}
        return WriterState(**(asdict(self._state) | hashes))

    def add_documents(self, ids_T: np.ndarray, lengths_D: np.ndarray) -> None:
        """Append documents of one sequence each, given as flat ids [T] and one length each [D], sum T.

        Raises:
            ValueError: an id outside 0..vocab_size - 1; names the document (counted from 0 over the dataset).
        """
        ids_T, lengths_D = np.asarray(ids_T), np.asarray(lengths_D, dtype=np.int64)
        assert ids_T.ndim == 1 and lengths_D.ndim == 1 and int(lengths_D.sum()) == ids_T.size
        largest = -1
        if ids_T.size:
            largest = int(ids_T.max())
            if int(ids_T.min()) < 0 or largest >= self.vocab_size:
                self._refuse_id(ids_T, lengths_D)
        if int(lengths_D.max(initial=0)) > _MAX_LENGTH:
            raise ValueError(f"{self.prefix}: a document of {lengths_D.max()} tokens; lengths are int32, split it")
        has_tokens_D = lengths_D > 0
        self.add_encoded(
            [ids_T.astype(self.dtype).tobytes()],
            lengths_D[has_tokens_D].astype(np.int32),
            has_tokens_D.astype(np.int32),
            max_token_id=largest,
        )

    def add_encoded(
        self, ids: Iterable[bytes], lengths_Q: np.ndarray, sequences_D: np.ndarray, *, max_token_id: int
    ) -> None:
        """Append documents whose ids are checked and in the dataset's dtype already.

        Args:
            ids: Bytes of the documents' ids, in pieces.
            lengths_Q: int32, tokens of each sequence.
            sequences_D: int32, sequences of each document, sum Q.
            max_token_id: Largest of the ids, -1 without any.
        """
        num_bytes = 0
        for piece in ids:
            self._write("bin", piece)
            num_bytes += len(piece)
        num_tokens = int(lengths_Q.sum(dtype=np.int64))
        assert lengths_Q.dtype == sequences_D.dtype == np.int32 and num_bytes == num_tokens * self.dtype.itemsize
        self._write("lengths", lengths_Q.tobytes())
        self._write("documents", sequences_D.tobytes())
        before = self._state
        self._state = WriterState(
            before.num_documents + sequences_D.size,
            before.num_sequences + lengths_Q.size,
            before.num_tokens + num_tokens,
            max(before.max_token_id, max_token_id),
        )

    def add_dataset(self, prefix: str) -> None:
        """Append another dataset of the same dtype, file to file; the vocabulary grows with the ids found in it.

        Raises:
            ValueError: the other dataset is damaged, of another dtype, or holds an id beyond the vocabulary in its
                sidecar.
        """
        require_index(prefix)
        header, index, sidecar = read_header(prefix), map_index(prefix), read_sidecar(prefix)
        if header.dtype != self.dtype:
            raise ValueError(
                f"{prefix} holds {header.dtype.name}, {self.prefix} {self.dtype.name}: they cannot be joined"
            )
        largest, tokens, found = -1, ProvedTokens(prefix), hashlib.sha256()
        for start in range(0, len(tokens), _CHUNK_BYTES):
            ids = tokens.read(start, min(start + _CHUNK_BYTES, len(tokens)))
            chunk = memoryview(ids.view(np.uint8))
            self._write("bin", chunk)
            found.update(chunk)
            largest = max(largest, int(ids.max()))
        if sidecar is not None and found.hexdigest() != sidecar.bin_sha256:
            raise ValueError(f"{prefix}.bin is not what {prefix}.json vouches for: get it again, or remove the sidecar "
                             "if it is another dataset's")
        if sidecar is not None and largest >= sidecar.vocab_size:
            raise ValueError(
                f"{prefix} holds id {largest}, its sidecar says vocab_size={sidecar.vocab_size}: make it again, or "
                "remove the sidecar if it is another dataset's"
            )
        self.vocab_size = max(self.vocab_size, largest + 1)
        for start in range(0, header.num_sequences, _CHUNK_BYTES):
            self._write("lengths", index.lengths_Q[start : start + _CHUNK_BYTES].tobytes())
        for start in range(0, header.num_documents, _CHUNK_BYTES):
            counts = np.diff(index.boundaries_D1[start : start + _CHUNK_BYTES + 1])
            self._write("documents", counts.astype(np.int32).tobytes())
        before = self._state
        self._state = WriterState(
            before.num_documents + header.num_documents,
            before.num_sequences + header.num_sequences,
            before.num_tokens + header.num_tokens,
            max(before.max_token_id, largest),
        )

    def complete(self) -> Sidecar:
        """Write the index and the sidecar, with `counts`, into the folder; nothing can be added afterwards."""
        state = self.state()
        self._sums_file.write(self._sums.last())
        self._sums_file.flush()
        for file in [*self._files, self._sums_file]:
            os.fsync(file.fileno())
        self.close()
        idx_sha256, idx_checksum = self._write_idx(state)
        sidecar = Sidecar(
            tokenizer_fingerprint=self._tokenizer_fingerprint,
            vocab_size=self.vocab_size,
            dtype=self.dtype.name,
            num_documents=state.num_documents,
            num_sequences=state.num_sequences,
            num_tokens=state.num_tokens,
            max_token_id=state.max_token_id,
            bin_sha256=state.bin_sha256,
            idx_sha256=idx_sha256,
            options=self._options,
            counts=dict(self.counts),
            sums_algorithm=self._sums.algorithm,
            idx_checksum=idx_checksum,
        )
        # A file name that is not UTF-8 has lone surrogates in Python: as JSON's escapes they can be written and read.
        with open(f"{self._base}.json", "w", encoding="utf-8", errors="backslashreplace") as stream:
            stream.write(sidecar.as_text())
            _flush_to_disk(stream)
        return sidecar

    def close(self) -> None:
        """Close the files; the folder stays."""
        for file in [*self._files, self._sums_file]:
            with contextlib.suppress(OSError):  # a full disk was reported by the write that met it
                file.close()
        self._files = []

    def _restore(self, state: WriterState) -> None:
        sizes = dict(zip(_GROWING, (state.num_tokens * self.dtype.itemsize, 4 * state.num_sequences,
                                    4 * state.num_documents), strict=True))
        try:
            for suffix, size in sizes.items():
                self._files.append(open(f"{self._base}.{suffix}", "ab", buffering=1 << 20))
                found = os.path.getsize(f"{self._base}.{suffix}")
                if found < size:
                    raise ValueError(f"{self._base}.{suffix} has {found} bytes where {size} were written")
                self._files[-1].truncate(size)
            for suffix in sizes:
                for chunk in read_chunks(f"{self._base}.{suffix}"):
                    self._take(suffix, chunk)
                if self._hashes[suffix].hexdigest() != getattr(state, f"{suffix}_sha256"):
                    raise ValueError(f"{self._base}.{suffix} is not what was written")
        except ValueError as error:
            self.close()
            raise ValueError(f"{error}, after a crash of the machine, say: start over with --overwrite") from None

    def _write(self, suffix: str, data: bytes | memoryview) -> None:
        """Append to one of the growing files."""
        self._take(suffix, data)
        self._files[_GROWING.index(suffix)].write(data)

    def _take(self, suffix: str, data: bytes | memoryview) -> None:
        """Have the hash of the next bytes of one of the growing files, and of ids the checksums too."""
        self._hashes[suffix].update(data)
        if suffix == "bin":
            self._sums_file.write(self._sums.update(data))

    def _refuse_id(self, ids_T: np.ndarray, lengths_D: np.ndarray) -> None:
        position = int(np.flatnonzero((ids_T < 0) | (ids_T >= self.vocab_size))[0])
        document = self.num_documents + int(np.searchsorted(np.cumsum(lengths_D), position, side="right"))
        raise ValueError(
            f"{self.prefix}: token id {int(ids_T[position])} of document {document} does not fit: ids must lie in "
            f"0..{self.vocab_size - 1} (vocab_size={self.vocab_size}, stored as {self.dtype.name}); use the tokenizer "
            "that made the ids"
        )

    def _write_idx(self, state: WriterState) -> tuple[str, str]:
        """Write the index; returns its hash and its checksum."""
        digest, checksum = hashlib.sha256(), RunningChecksum()
        header = HEADER.pack(MAGIC, 1, CODE_OF_DTYPE[self.dtype], state.num_sequences, state.num_documents + 1)
        with open(f"{self._base}.idx", "wb") as stream:
            for part in _idx_parts(header, f"{self._base}.lengths", f"{self._base}.documents", self.dtype.itemsize):
                digest.update(part)
                checksum.update(part)
                stream.write(part)
            _flush_to_disk(stream)
        return digest.hexdigest(), checksum.text()


def publish(folder: str, prefix: str) -> None:
    """Rename a completed dataset's files into place; may be repeated after it was cut short.

    Index and sidecar of a dataset that is being replaced go first and the new index comes last, so that a machine
    which dies in between leaves no pair that a reader opens. An error takes back what was renamed.
    """
    base = os.path.join(folder, os.path.basename(prefix))
    bin_path, idx_path, sidecar_path = dataset_paths(prefix)
    checksums_path = sums_path(prefix)
    new = {path: f"{base}{os.path.splitext(path)[1]}" for path in (bin_path, checksums_path, sidecar_path, idx_path)}
    if os.path.exists(new[bin_path]):
        for path in (idx_path, sidecar_path, checksums_path):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
    renamed: list[str] = []
    try:
        for path in new:
            if os.path.exists(new[path]):
                os.replace(new[path], path)
                renamed.append(path)
    except OSError:
        for path in renamed:
            os.replace(path, new[path])
        raise
    for suffix in ("lengths", "documents"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{base}.{suffix}")


def _idx_parts(header: bytes, lengths_path: str, documents_path: str, itemsize: int) -> Iterator[bytes]:
    """The index from front to back: header, lengths, byte offsets, document boundaries."""
    yield header
    yield from read_chunks(lengths_path)
    offset = 0
    for chunk in read_chunks(lengths_path):
        ends = offset + np.cumsum(np.frombuffer(chunk, np.int32), dtype=np.int64) * itemsize
        yield np.concatenate([[offset], ends[:-1]]).astype(np.int64).tobytes()
        offset = int(ends[-1])
    boundary = 0
    yield np.zeros(1, np.int64).tobytes()
    for chunk in read_chunks(documents_path):
        boundaries = boundary + np.cumsum(np.frombuffer(chunk, np.int32), dtype=np.int64)
        yield boundaries.tobytes()
        boundary = int(boundaries[-1])


def _flush_to_disk(stream: IO[Any]) -> None:
    stream.flush()
    os.fsync(stream.fileno())
