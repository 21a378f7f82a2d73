"""What is in a dataset, and whether it is whole: statistics, decoded documents, verification against its sidecar."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dsv3_megatron.data.contents import require_index
from dsv3_megatron.data.indexed import (
    IndexArrays,
    dataset_paths,
    map_index,
    read_chunks,
    read_header,
    read_sidecar,
)
from dsv3_megatron.data.proved_tokens import ProvedTokens

_CHUNK = 1 << 22


@dataclass(frozen=True)
class DatasetStatistics:
    """Counts of a dataset. Lengths are tokens of a document, empty documents included."""

    num_documents: int
    num_empty_documents: int
    num_sequences: int
    num_tokens: int
    dtype: str
    bytes_on_disk: int
    mean_length: float
    percentiles: dict[int, int]
    longest: int


def document_lengths(prefix: str) -> np.ndarray:
    """Tokens of each document, int64 [D]."""
    index = map_index(prefix)
    before_Q1 = np.concatenate([[0], np.cumsum(index.lengths_Q, dtype=np.int64)])
    return np.diff(before_Q1[index.boundaries_D1])


def read_document(prefix: str, number: int) -> np.ndarray:
    """The ids of one document, in the dataset's dtype.

    Raises:
        ValueError: there is no such document.
    """
    header, index = read_header(prefix), map_index(prefix)
    if not 0 <= number < header.num_documents:
        raise ValueError(f"document {number} of {prefix} must lie in 0..{header.num_documents - 1}")
    first, last = (int(index.boundaries_D1[at]) for at in (number, number + 1))
    if first == last:
        return np.empty(0, header.dtype)
    count = int(index.lengths_Q[first:last].sum(dtype=np.int64))
    start = int(index.offsets_Q[first]) // header.dtype.itemsize
    return ProvedTokens(prefix).read(start, start + count)


def measure(prefix: str) -> DatasetStatistics:
    """Count a dataset's documents, sequences and tokens, and measure its documents' lengths.

    Raises:
        ValueError: a file is missing or damaged.
    """
    require_index(prefix)
    header = read_header(prefix)
    lengths_D = document_lengths(prefix)
    shares = (5, 25, 50, 75, 95, 99)
    found = np.percentile(lengths_D, shares, method="lower").tolist() if lengths_D.size else [0] * len(shares)
    return DatasetStatistics(
        num_documents=header.num_documents,
        num_empty_documents=int((lengths_D == 0).sum()),
        num_sequences=header.num_sequences,
        num_tokens=header.num_tokens,
        dtype=header.dtype.name,
        bytes_on_disk=sum(os.path.getsize(path) for path in dataset_paths(prefix)[:2]),
        mean_length=float(lengths_D.mean()) if lengths_D.size else 0.0,
        percentiles=dict(zip(shares, map(int, found), strict=True)),
        longest=int(lengths_D.max(initial=0)),
    )


def verify(prefix: str, *, report: Callable[[int], None] | None = None) -> list[str]:
    """Look for every kind of damage: truncation, changed bytes, an index that contradicts itself or the data.

    Args:
        prefix: The dataset.
        report: Called with the number of bytes each time some have been read.

    Returns:
        What is wrong, in words; empty for a sound dataset. Changed bytes can only be seen with a sidecar.
    """
    try:
        header = read_header(prefix)
    except ValueError as error:
        return [str(error)]
    problems = _check_index(prefix, map_index(prefix), header.dtype.itemsize, header.num_tokens)
    try:
        sidecar = read_sidecar(prefix)
    except ValueError as error:
        return [*problems, str(error)]
    if sidecar is None:
        return problems
    bin_path, idx_path, sidecar_path = dataset_paths(prefix)
    bin_sha256, largest, damage = _read_tokens(prefix, report or _ignore)
    for path, found, wanted in ((bin_path, bin_sha256, sidecar.bin_sha256),
                                (idx_path, _hash(idx_path, report or _ignore), sidecar.idx_sha256)):
        if found != wanted:
            problems.append(f"{path} is not what {sidecar_path} vouches for: sha256 {found[:12]}, not {wanted[:12]}")
    counted = (header.num_documents, header.num_sequences, header.num_tokens, header.dtype.name)
    noted = (sidecar.num_documents, sidecar.num_sequences, sidecar.num_tokens, sidecar.dtype)
    if counted != noted:
        problems.append(
            f"{sidecar_path} speaks of documents, sequences, tokens, dtype {noted}, {idx_path} of {counted}"
        )
    if damage is not None:
        problems.append(str(damage))
    if largest >= sidecar.vocab_size:
        problems.append(f"{bin_path} holds id {largest}, the vocabulary has {sidecar.vocab_size}")
    return problems


def _check_index(prefix: str, index: IndexArrays, itemsize: int, num_tokens: int) -> list[str]:
    """Contradictions inside an index, chunk by chunk."""
    path = dataset_paths(prefix)[1]
    offset = 0
    for start in range(0, index.lengths_Q.size, _CHUNK):
        lengths = index.lengths_Q[start : start + _CHUNK].astype(np.int64)
        if (lengths <= 0).any():
            at = start + int(np.flatnonzero(lengths <= 0)[0])
            return [f"{path}: sequence {at} has {index.lengths_Q[at]} tokens"]
        ends = offset + np.cumsum(lengths) * itemsize
        wanted = np.concatenate([[offset], ends[:-1]])
        wrong = np.flatnonzero(index.offsets_Q[start : start + _CHUNK] != wanted)
        if wrong.size:
            at = int(wrong[0])
            return [f"{path}: sequence {start + at} begins at byte {index.offsets_Q[start + at]}, not {wanted[at]}"]
        offset = int(ends[-1])
    problems = []
    if offset != num_tokens * itemsize:
        problems.append(f"{path}: its sequences have {offset // itemsize} tokens, the .bin file {num_tokens}")
    bounds = index.boundaries_D1
    if bounds[0] != 0 or bounds[-1] != index.lengths_Q.size:
        problems.append(
            f"{path}: documents run from sequence {bounds[0]} to {bounds[-1]}, not 0 to {index.lengths_Q.size}"
        )
    for start in range(0, bounds.size, _CHUNK):
        falls = np.flatnonzero(np.diff(bounds[start : start + _CHUNK + 1]) < 0)
        if falls.size:
            problems.append(f"{path}: document {start + int(falls[0])} ends before it begins")
            break
    return problems


def _read_tokens(prefix: str, report: Callable[[int], None]) -> tuple[str, int, ValueError | None]:
    """The hash of a .bin file, its largest id (-1 without any), and the first damage by its checksums; read once."""
    damage: ValueError | None = None
    try:
        tokens = ProvedTokens(prefix)
    except ValueError as error:
        damage, tokens = error, ProvedTokens(prefix, is_verified=False)
    digest, largest = hashlib.sha256(), -1
    for start in range(0, len(tokens), _CHUNK):
        stop = min(start + _CHUNK, len(tokens))
        try:
            if damage is None:
                tokens.read(start, stop)
        except ValueError as error:
            damage = error
        ids = tokens.tokens_T[start:stop]
        digest.update(ids.view(np.uint8))
        largest = max(largest, int(ids.max()))
        report(ids.nbytes)
    return digest.hexdigest(), largest, damage


def _hash(path: str, report: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    for chunk in read_chunks(path):
        digest.update(chunk)
        report(len(chunk))
    return digest.hexdigest()


def _ignore(_num_bytes: int) -> None:
    """The report that nobody reads."""


def plot_lengths(prefix: str, path: str) -> None:
    """Write a histogram of document lengths as PNG: documents and tokens by length, on a logarithmic axis."""
    from matplotlib.figure import Figure

    lengths_D = document_lengths(prefix)
    lengths_D = lengths_D[lengths_D > 0]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    if lengths_D.size:
        edges = np.unique(np.geomspace(int(lengths_D.min()), int(lengths_D.max()) + 1, 61).round().astype(np.int64))
        edges = edges if edges.size > 1 else np.array([1, 2])
        for weights, label in ((None, "documents"), (lengths_D.astype(np.float64), "tokens")):
            counts, _ = np.histogram(lengths_D, edges, weights=weights)
            axes.stairs(counts / counts.sum(), edges, fill=weights is None, alpha=0.6, label=f"share of {label}")
        axes.set_xscale("log")
        axes.axvline(float(np.median(lengths_D)), color="black", linewidth=0.8, linestyle="--", label="median document")
        axes.legend()
    axes.set(
        title=f"{os.path.basename(prefix)}: {lengths_D.size:,} documents with tokens, {int(lengths_D.sum()):,} tokens",
        xlabel="tokens in a document",
        ylabel="share",
    )
    figure.savefig(path, format="png", dpi=120)
