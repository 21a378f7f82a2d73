"""Training samples out of conversations, by number: whole conversations packed into a sequence, each by itself.

A sample is seq_length + 1 ids, as one of texts is, and holds one conversation or several behind each other; what is
left is filled. Each conversation, and the filling, is a document of its own: attention stops at its ends and positions
restart. The label of a position counts where it is a token of the same conversation whose mask is 1.

An epoch has every sequence of `packing.py` once, in an order of its own that follows from the seed and the epoch alone,
as that of texts does (data/samples.py); nothing is written to disk.

Legend: S positions of a sequence, d documents.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch

from dsv3_megatron.data.chat.masked import mask_prefix
from dsv3_megatron.data.chat.packing import Packing, pack_lengths
from dsv3_megatron.data.document_ends import restarted_positions
from dsv3_megatron.data.indexed import dataset_paths, map_index, read_header, read_sidecar
from dsv3_megatron.data.order import Permutation, derive_keys
from dsv3_megatron.data.proved_tokens import ProvedTokens


@dataclass(frozen=True)
class PackedRow:
    """One packed sample: ids, mask and bounds.

    Attributes:
        ids_S1: int64 [S + 1], tokens and the one after them.
        mask_S: float32 [S], 1 where the label of the position counts.
        bounds: First positions of the conversations, from 0, then of the filling if there is one, then S.
        extras_S: Further float32 [S] by name, each the value of the position's label; 0 where it does not count.
        continued: Number, for each document, of the one in this row that it goes on from, sees, and counts its
            positions from; its own number where there is none. Empty: there is none for any.
    """

    ids_S1: np.ndarray
    mask_S: np.ndarray
    bounds: tuple[int, ...]
    extras_S: Mapping[str, np.ndarray] = field(default_factory=dict)
    continued: tuple[int, ...] = ()


def pack_row(documents: Sequence[tuple[np.ndarray, ...]], length: int, *, filling: int, names: Sequence[str] = (),
             continued: Sequence[int] = ()) -> PackedRow:
    """Lay documents behind each other in a row.

    Args:
        documents: Ids of each document, what counts of them, and further values of each token, one for each name;
            together they have at most `length` + 1 tokens.
        length: Positions of the row, without the token after the last.
        filling: Token id behind them.
        names: Names of the further values.
        continued: Number, for each document, of the one that it goes on from, or its own; empty: none does.
    """
    ids_S1 = np.full(length + 1, filling, dtype=np.int64)
    # Of the token at each place; a label's place is one further on than its position.
    values = np.zeros((1 + len(names), length + 1), dtype=np.float32)
    starts, at = [], 0
    for ids, *rest in documents:
        ids_S1[at : at + len(ids)] = ids
        values[:, at : at + len(ids)] = rest
        values[:, at] = 0.0  # its label's position is in the document before
        starts.append(at)
        at += len(ids)
    starts += [at] if at < length else []
    bounds = (*(start for start in starts if start < length), length)
    if continued:
        continued = (*continued, *range(len(continued), len(bounds) - 1))
    return PackedRow(ids_S1, values[0, 1:], bounds, dict(zip(names, values[1:, 1:], strict=True)), tuple(continued))


@dataclass(frozen=True)
class _Taken:
    """The conversations of a share that are taken, and how they are packed.

    Attributes:
        numbers_d: int64, numbers in the dataset.
        lengths_d: int64, tokens of each, what is cut off left out.
        num_long: Conversations of the share that are too long.
        packing: Which of them share a sequence.
    """

    numbers_d: np.ndarray
    lengths_d: np.ndarray
    num_long: int
    packing: Packing


@lru_cache(16)
def _take(prefix: str, _stamp: tuple[int, int], share: tuple[int, int], seq_length: int, seed: int, number: int,
          long_conversations: str) -> _Taken:
    """Take and pack the conversations of a share; a run asks for its length, for its checks and for its samples.

    Args other than `_stamp`, which tells the index from another one of its name, are those of `PackedConversations`.
    """
    first, stop = share
    lengths_d = np.asarray(map_index(prefix).lengths_Q[first:stop]).astype(np.int64)
    is_long_d = lengths_d > seq_length + 1
    num_long = int(is_long_d.sum())
    if num_long and long_conversations == "refuse":
        at = int(np.argmax(is_long_d))
        raise ValueError(
            f"{prefix} has {num_long} conversation(s) of more than seq_length + 1 = {seq_length + 1} tokens, such as "
            f"number {first + at} of {lengths_d[at]}; give a larger seq_length (the longest has {lengths_d.max()}), or "
            "long_conversations=cut or drop")
    numbers_d = np.arange(first, stop)
    if long_conversations == "drop":
        numbers_d, lengths_d = numbers_d[~is_long_d], lengths_d[~is_long_d]
    if not len(numbers_d):
        raise ValueError(f"{prefix} has no conversation of at most seq_length + 1 = {seq_length + 1} tokens in the "
                         "share that is read: use more data, a larger seq_length or another split")
    lengths_d = np.minimum(lengths_d, seq_length + 1)
    (key,) = derive_keys("packing", seed, number, count=1)
    return _Taken(numbers_d, lengths_d, num_long, pack_lengths(lengths_d, seq_length + 1, key=key))


class PackedRows(Protocol):
    """Packed samples by number."""

    def read(self, index: int) -> PackedRow:
        """The sample at an index."""
        ...


class PackedConversations:
    """The samples of one dataset of conversations, epoch after epoch without end.

    Args:
        prefix: Path of PREFIX.bin and PREFIX.idx, without suffix; its mask is beside it.
        share: [first, stop) of the file's conversations that are read.
        seq_length: Tokens of a sample, without the one after it.
        seed: Seed of packing and order.
        number: Position of the dataset in its blend.
        long_conversations: What becomes of conversations of more than seq_length + 1 tokens: "refuse", "cut" or "drop".
        is_verified: Whether blocks of tokens and masks are compared with their checksums when they are first read.

    Attributes:
        num_conversations: Conversations that are taken.
        num_long: Conversations of the share that are too long: they are cut, or left out.
        num_tokens: Tokens of those that are taken, what is cut off left out.
        samples_per_epoch: Samples of an epoch.

    Raises:
        ValueError: a conversation is too long and is to be refused, or none is left.
    """

    def __init__(self, prefix: str, share: tuple[int, int], *, seq_length: int, seed: int, number: int = 0,
                 long_conversations: str = "refuse", is_verified: bool = True) -> None:
        self.prefix, self.seq_length, self.seed, self.number = prefix, seq_length, seed, number
        index = os.stat(dataset_paths(prefix)[1])
        taken = _take(prefix, (index.st_size, index.st_mtime_ns), share, seq_length, seed, number, long_conversations)
        self._numbers_d, self._lengths_d, self._packing = taken.numbers_d, taken.lengths_d, taken.packing
        self.num_long, self.num_tokens = taken.num_long, int(taken.lengths_d.sum())
        self.num_conversations, self.samples_per_epoch = len(taken.numbers_d), len(taken.packing)
        sidecar = read_sidecar(prefix)
        self._filling = int((sidecar.options.get("eod_id") if sidecar is not None else None) or 0)
        self._tokens, self._masks = (
            _Stored(each, is_verified=is_verified) for each in (prefix, mask_prefix(prefix)))
        self._order_of_epoch = lru_cache(2)(self._order_of_epoch_uncached)

    def read(self, index: int) -> PackedRow:
        """The sample at an index."""
        epoch, place = divmod(index, self.samples_per_epoch)
        documents = []
        for conversation in self._packing[self._order_of_epoch(epoch)[place]].tolist():
            number, count = int(self._numbers_d[conversation]), int(self._lengths_d[conversation])
            documents.append((self._tokens.read(number, count), self._masks.read(number, count)))
        return pack_row(documents, self.seq_length, filling=self._filling)

    def _order_of_epoch_uncached(self, epoch: int) -> Permutation:
        return Permutation(self.samples_per_epoch, derive_keys("samples", self.seed, self.number, epoch, count=8))


class ConversationSamples:
    """What the batch iterator reads: tokens, labels, loss mask, positions and the conversations' bounds.

    Args:
        source: Packed samples.
        num_samples: How many there are to be read.
    """

    def __init__(self, source: PackedRows, num_samples: int) -> None:
        self.source, self.num_samples = source, num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        row = self.source.read(index)
        return {"tokens": torch.from_numpy(row.ids_S1[:-1]), "labels": torch.from_numpy(row.ids_S1[1:]),
                "loss_mask": torch.from_numpy(row.mask_S), "document_bounds": row.bounds,
                "continued": row.continued,
                "position_ids": torch.from_numpy(restarted_positions(row.bounds, row.continued)),
                "extras": {name: torch.from_numpy(values_S) for name, values_S in row.extras_S.items()}}


class _Stored:
    """The sequences of a dataset by number, mapped into memory."""

    def __init__(self, prefix: str, *, is_verified: bool) -> None:
        header, index = read_header(prefix), map_index(prefix)
        # Bare arrays over the mapped files: numpy's own class for them is slow to index.
        self._offsets_Q, self._item_bytes = np.asarray(index.offsets_Q), header.dtype.itemsize
        self._values = ProvedTokens(prefix, is_verified=is_verified)

    def read(self, number: int, count: int) -> np.ndarray:
        """The first values of a sequence."""
        first = int(self._offsets_Q[number]) // self._item_bytes
        return self._values.read(first, first + count)
