"""Ends of documents in packed sequences: the token that ends one, and the bounds it draws in a batch.

The end-of-document token (EOD) is the one rule for Megatron-LM's --reset-attention-mask, --reset-position-ids and
--eod-mask-loss: what follows an EOD is another document, also where a text holds the token in its midst. So they need
data in which every document ends with it.

No torch here: a run checks its data with this module before it allocates anything.

Legend: B sequences, S positions of a sequence, d documents.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from dsv3_megatron.data.indexed import dataset_paths, map_index, read_header, read_sidecar
from dsv3_megatron.data.tokenizer import find_eod_id, load_tokenizer

_NUM_DOCUMENTS_READ = 1000


def resolve_eod_id(prefixes: Sequence[str], *, tokenizer_model: str | None, flags: Sequence[str]) -> int:
    """The EOD of a run's data, which every document read here ends with.

    Each dataset's sidecar names it; for one that does not, the run's tokenizer does. The last tokens of up to a
    thousand documents a dataset, evenly spaced, are read to see that they are it.

    Args:
        prefixes: All datasets of the run.
        tokenizer_model: Folder or file of the run's tokenizer, if it names one.
        flags: Settings that need the EOD, for the messages; at least one.

    Raises:
        ValueError: nothing says which token it is, two datasets differ in it, or documents do not end with it.
    """
    because = f"{' and '.join(flags)} need{'s' if len(flags) == 1 else ''} documents that end with an EOD token"
    way_out = f"or leave {' and '.join(flags)} off"
    found: dict[int, str] = {}
    for prefix in prefixes:
        sidecar = read_sidecar(prefix)
        options = sidecar.options if sidecar is not None else {}
        if options.get("append_eod") is False:
            raise ValueError(f"{because}, and {prefix} was made without --append-eod: make it again with "
                             f"dsv3 preprocess --append-eod, {way_out}")
        eod_id = options.get("eod_id")
        if eod_id is None:
            if tokenizer_model is None:
                raise ValueError(f"{because}, and nothing says which token that is in {prefix}, which has no sidecar "
                                 f"with an eod_id: give the tokenizer that made it (--tokenizer-model DIR), {way_out}")
            eod_id = find_eod_id(load_tokenizer(tokenizer_model), tokenizer_model)
        _check_ends(prefix, eod_id, because, way_out)
        found.setdefault(eod_id, prefix)
    if len(found) > 1:
        parts = ", ".join(f"{eod_id} in {prefix}" for eod_id, prefix in found.items())
        raise ValueError(f"{because}, the same in all datasets, but it is {parts}: preprocess all with one tokenizer, "
                         f"{way_out}")
    return next(iter(found))


def named_eod_id(prefixes: Sequence[str], tokenizer_model: str | None) -> int | None:
    """The EOD that the sidecars of datasets name, or else a tokenizer does; None where neither says it.

    Unlike `resolve_eod_id` it takes their word: the datasets need not be there any more, and no token is read.

    Args:
        prefixes: Paths of datasets, without suffix; one without a sidecar says nothing.
        tokenizer_model: Folder or file of a tokenizer that is there.

    Raises:
        ValueError: a sidecar or the tokenizer is damaged.
    """
    sidecars = [sidecar for sidecar in map(read_sidecar, prefixes) if sidecar is not None]
    named = {sidecar.options["eod_id"] for sidecar in sidecars if sidecar.options.get("eod_id") is not None}
    if len(named) == 1:
        return named.pop()
    return find_eod_id(load_tokenizer(tokenizer_model), tokenizer_model) if tokenizer_model is not None else None


def _check_ends(prefix: str, eod_id: int, because: str, way_out: str) -> None:
    header, index = read_header(prefix), map_index(prefix)
    if not header.num_tokens:
        return
    tokens_T = np.memmap(dataset_paths(prefix)[0], header.dtype, "r")
    read_d = np.unique(np.linspace(0, header.num_documents - 1, min(header.num_documents, _NUM_DOCUMENTS_READ)))
    read_d = read_d.astype(np.int64)
    read_d = read_d[index.boundaries_D1[read_d + 1] > index.boundaries_D1[read_d]]  # an empty one ends with nothing
    last_Q = index.boundaries_D1[read_d + 1] - 1
    last_d = tokens_T[index.offsets_Q[last_Q] // header.dtype.itemsize + index.lengths_Q[last_Q] - 1]
    wrong = np.flatnonzero(last_d != eod_id)
    if wrong.size:
        raise ValueError(
            f"{because}, here {eod_id}, but {wrong.size} of {read_d.size} documents read from {prefix} do not, such as "
            f"number {int(read_d[wrong[0]])}, whose last token is {int(last_d[wrong[0]])}: make the data again with "
            f"dsv3 preprocess --append-eod, {way_out}"
        )


def document_bounds(tokens_BS: np.ndarray, eod_id: int) -> tuple[tuple[int, ...], ...]:
    """The bounds of each sequence's documents: their first positions, from 0, and at the end the sequence's length.

    A document runs to its EOD inclusive. The first one of a sequence may have begun in the sequence before it, and the
    last one may go on in the next: each part is a document here, as for Megatron-LM.
    """
    length = tokens_BS.shape[1]
    rows = []
    for tokens_S in tokens_BS:
        starts = np.flatnonzero(tokens_S[:-1] == eod_id) + 1
        rows.append((0, *starts.tolist(), length))
    return tuple(rows)


def restarted_positions(bounds: Sequence[int], continued: Sequence[int] = ()) -> np.ndarray:
    """Positions that count from 0 in each document of a sequence, int64 [S], as Megatron-Core's datasets restart them.

    Args:
        bounds: Bounds of one sequence, as `document_bounds` gives them.
        continued: Number, for each document, of the one whose positions it goes on from, or its own; empty: none does.
    """
    positions = [np.arange(end - start) for start, end in itertools.pairwise(bounds)]
    for number, before in enumerate(continued):
        if before != number:
            positions[number] += len(positions[before])
    return np.concatenate(positions)
