"""Training samples out of .bin/.idx files, by number: sample n depends on the data, the seed and n, on nothing else.

An epoch goes over a dataset once. In epoch e, the sequences of the file (documents, mostly) are shuffled in groups of
4096 neighbours, laid end to end and cut into samples of seq_length tokens, each with the token after it; then the
samples are taken in an order of their own, over the whole dataset. Both depend on (seed, e), so every epoch is packed
and ordered anew. Sample n is the (n mod N)-th of epoch n // N, where an epoch has N samples. It is computed when it is
asked for (order.py): no index is built, over one epoch or all of them, nothing is written to disk, and a longer run
takes the same samples as a shorter one before it goes on.

Megatron-Core shuffles the same way in principle, but all epochs of a run at once, with an index on disk. Groups instead
of a shuffle over the whole file are what lets a place be found without one: a group's tokens lie where they lay.

Shapes: S sequence, g sequences of a group.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch

from dsv3_megatron.data.document_ends import document_bounds, restarted_positions
from dsv3_megatron.data.indexed import map_index, read_header
from dsv3_megatron.data.order import Permutation, derive_keys, mix_array
from dsv3_megatron.data.proved_tokens import ProvedTokens

_GROUP_SEQUENCES = 4096
_GROUPS_KEPT = 64
# Length of a dataset that is gone over as often as a run wants.
ENDLESS = 1 << 62


class TokenSource(Protocol):
    """Rows of ids by sample number: int64 [S + 1]."""

    def read(self, index: int) -> np.ndarray:
        """Ids of the sample at an index, int64 [S + 1]: its tokens and the one after them."""
        ...


class ShuffledTokens:
    """The samples of one dataset as tokens, epoch after epoch without end.

    Args:
        prefix: Path of PREFIX.bin and PREFIX.idx, without suffix.
        share: [first, stop) of the file's sequences that are read.
        seq_length: Tokens of a sample, without the one after it.
        seed: Seed of the shuffles.
        number: Position of the dataset in its blend: datasets of one blend are shuffled differently.
        is_verified: Whether blocks of tokens are compared with their checksums when they are first read.

    Attributes:
        num_tokens: Tokens in the share.
        samples_per_epoch: Whole samples of an epoch; 0 where the share is too small for one.
    """

    def __init__(self, prefix: str, share: tuple[int, int], *, seq_length: int, seed: int, number: int = 0,
                 is_verified: bool = True) -> None:
        self.prefix, self.seq_length, self.seed, self.number = prefix, seq_length, seed, number
        self._first, self._stop = share
        header = read_header(prefix)
        index = map_index(prefix)
        self._item_bytes = header.dtype.itemsize
        # Bare arrays over the mapped files: numpy's own class for them is slow to index.
        self._lengths_Q, self._offsets_Q = np.asarray(index.lengths_Q), np.asarray(index.offsets_Q)
        self._num_groups = -(-(self._stop - self._first) // _GROUP_SEQUENCES)
        self._start = self._token_of(self._first)
        self.num_tokens = self._token_of(self._stop) - self._start
        self.samples_per_epoch = max(0, self.num_tokens - 1) // seq_length
        self._tokens = ProvedTokens(prefix, is_verified=is_verified)
        self._order_of_epoch = lru_cache(2)(self._order_of_epoch_uncached)
        self._group = lru_cache(_GROUPS_KEPT)(self._group_uncached)

    def _token_of(self, sequence: int) -> int:
        """Find where a sequence begins in the file, in tokens; of the one after the last, where the file ends."""
        if sequence == 0:
            return 0
        return int(self._offsets_Q[sequence - 1]) // self._item_bytes + int(self._lengths_Q[sequence - 1])

    def read(self, index: int) -> np.ndarray:
        """The ids of a sample, int64 [S + 1]."""
        epoch, place = divmod(index, self.samples_per_epoch)
        first = self._order_of_epoch(epoch)[place] * self.seq_length
        return self._read_stream(epoch, first, self.seq_length + 1)

    def _order_of_epoch_uncached(self, epoch: int) -> Permutation:
        return Permutation(self.samples_per_epoch, derive_keys("samples", self.seed, self.number, epoch, count=8))

    def _read_stream(self, epoch: int, first: int, count: int) -> np.ndarray:
        """Read so many tokens of an epoch's shuffled sequences from a place on."""
        ids_S, filled = np.empty(count, dtype=np.int64), 0
        group = bisect.bisect_right(range(self._num_groups), first, key=self._start_of_group) - 1
        while filled < count:
            offset = first + filled - self._start_of_group(group)
            starts_G1, sources_g = self._group(epoch, group)
            number = int(np.searchsorted(starts_G1, offset, side="right")) - 1
            while filled < count and number < len(sources_g):
                skipped = offset - int(starts_G1[number])
                taken = min(int(starts_G1[number + 1]) - offset, count - filled)
                source = int(sources_g[number]) + skipped
                ids_S[filled : filled + taken] = self._tokens.read(source, source + taken)
                filled, offset, number = filled + taken, offset + taken, number + 1
            group += 1
        return ids_S

    def _start_of_group(self, group: int) -> int:
        """Tokens of the share before a group."""
        return self._token_of(min(self._first + group * _GROUP_SEQUENCES, self._stop)) - self._start

    def _group_uncached(self, epoch: int, group: int) -> tuple[np.ndarray, np.ndarray]:
        """A group's shuffled sequences: where each begins in the group, and after the last one; where it lies on disk.

        int64 [g + 1] and int64 [g], both in tokens.
        """
        first = self._first + group * _GROUP_SEQUENCES
        stop = min(first + _GROUP_SEQUENCES, self._stop)
        (key,) = derive_keys("sequences", self.seed, self.number, epoch, group, count=1)
        order_g = np.argsort(mix_array(np.arange(stop - first, dtype=np.uint64) ^ np.uint64(key)))  # no two are equal
        lengths_g = self._lengths_Q[first:stop].astype(np.int64)
        starts_G1 = np.concatenate([[0], np.cumsum(lengths_g[order_g])])
        if starts_G1[-1] != self._token_of(stop) - self._token_of(first):
            raise ValueError(f"{self.prefix}.idx: sequences {first} to {stop - 1} do not lie end to end in the .bin "
                             "file, as those of Megatron-Core's datasets do; make the dataset again")
        return starts_G1, self._offsets_Q[first:stop][order_g] // self._item_bytes


class Samples:
    """What the batch iterator reads: tokens, labels, loss mask and positions of each sample.

    Args:
        source: Token ids of each sample.
        num_samples: How many there are to be read; ENDLESS: as many as are asked for.
        eod_id: Token that ends a document; None where nothing depends on it.
        reset_position_ids: Position ids restart after an EOD.
        eod_mask_loss: Positions whose input is an EOD do not count.
    """

    def __init__(self, source: TokenSource, num_samples: int, *, eod_id: int | None = None,
                 reset_position_ids: bool = False, eod_mask_loss: bool = False) -> None:
        self.source, self.num_samples = source, num_samples
        self.eod_id, self.reset_position_ids, self.eod_mask_loss = eod_id, reset_position_ids, eod_mask_loss

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        ids = self.source.read(index)
        tokens_S, labels_S = ids[:-1], ids[1:]
        mask_S, positions_S = np.ones(len(tokens_S), dtype=np.float32), np.arange(len(tokens_S), dtype=np.int64)
        if self.eod_mask_loss:
            mask_S[tokens_S == self.eod_id] = 0.0
        if self.reset_position_ids:
            assert self.eod_id is not None
            (bounds,) = document_bounds(tokens_S[None], self.eod_id)
            positions_S = restarted_positions(bounds)
        return {"tokens": torch.from_numpy(tokens_S), "labels": torch.from_numpy(labels_S),
                "loss_mask": torch.from_numpy(mask_S), "position_ids": torch.from_numpy(positions_S)}
