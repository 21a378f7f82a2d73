"""How a sequence is split over context-parallel ranks: the one place that knows.

A sequence is cut into 2 CP equal chunks, and rank r has chunks r and 2 CP - 1 - r, the earlier one first. Under causal
attention an early chunk looks at little and a late one at much: so every rank computes equally much. A rank's tokens
are in the order of the sequence, with a gap between its two chunks.

Token ids, labels, loss masks, positions and document bounds are of whole sequences on every rank, as each reads the
batch itself. What a token's neighbours are is therefore found before the cut, and no rank asks another for it. Hidden
states and losses are of the rank's part. The embedding, the labels of a loss and its mask are where the two meet.

Legend: S positions of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from dsv3_megatron.ops.attention import DocumentBounds, group_sequences
from dsv3_megatron.ops.block_attention import Region


class _Group(Protocol):
    def rank(self) -> int: ...

    def size(self) -> int: ...


class _Groups(Protocol):
    cp: _Group


@dataclass(frozen=True)
class SequenceParts:
    """The split of every sequence, seen from one rank.

    Attributes:
        size: Ranks that a sequence is split over; 1: it is whole.
        rank: Place of this rank among them.
    """

    size: int = 1
    rank: int = 0

    @classmethod
    def of(cls, groups: _Groups) -> SequenceParts:
        """The split over a run's context-parallel ranks."""
        return cls(groups.cp.size(), groups.cp.rank())

    def chunks(self, length: int, rank: int | None = None) -> tuple[tuple[int, int], ...]:
        """First position and end of each stretch of the sequence that a rank has, in their order.

        Args:
            length: S; a multiple of 2 x size where the sequence is split.
            rank: A rank of the split; None: this one.
        """
        if self.size == 1:
            return ((0, length),)
        rank = self.rank if rank is None else rank
        step, rest = divmod(length, 2 * self.size)
        assert not rest, f"{length} positions do not make {2 * self.size} chunks"
        return tuple((index * step, (index + 1) * step) for index in (rank, 2 * self.size - 1 - rank))

    def take(self, whole: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's part of a tensor whose dimension `dim` is the whole sequence; of 1 rank, the tensor itself."""
        if self.size == 1:
            return whole
        return torch.cat([whole.narrow(dim, start, end - start)
                          for start, end in self.chunks(whole.shape[dim])], dim=dim)

    def join(self, parts: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
        """The whole sequence of the parts of all ranks, in the ranks' order: the inverse of `take`."""
        if self.size == 1:
            return parts[0]
        halves = [part.chunk(2, dim=dim) for part in parts]
        return torch.cat([early for early, _ in halves] + [late for _, late in reversed(halves)], dim=dim)

    def positions(self, length: int, device: torch.device | None = None) -> torch.Tensor:
        """Place in the sequence of each of this rank's tokens, int64 [S / size]."""
        return self.take(torch.arange(length, device=device), 0)

    def places(self, length: int, device: torch.device | None = None) -> torch.Tensor:
        """Place in this rank's part of each position of the sequence, int64 [S]; -1 where another rank has it."""
        places_S = torch.full((length,), -1, dtype=torch.int64, device=device)
        own_s = self.positions(length, device)
        places_S[own_s] = torch.arange(len(own_s), device=device)
        return places_S

    def visible(self, other: int, length: int, batch: int, bounds: DocumentBounds | None) -> tuple[Region, ...]:
        """What this rank's queries see of another rank's keys, both numbered within the rank's part.

        The two parts interlock: of a lower rank, all queries come behind the first chunk of keys and before the second;
        of a higher rank, the second chunk of queries comes behind all keys, and the first before them. A document's
        tokens lie together in each part.

        Args:
            other: A rank of the split.
            length: Positions of a sequence, S.
            batch: Number of sequences.
            bounds: Documents that do not see each other, as of `causal_attention`, of the whole sequence.

        Returns:
            Regions without a common pair of query and key; none where nothing is seen.
        """
        part = length // self.size
        half = part // 2
        queries, keys = (0, part), (0, part)
        if other < self.rank:
            keys = (0, half)
        elif other > self.rank:
            queries = (half, part)
        regions = []
        for sequences, documents in group_sequences(bounds, length, batch):
            for document in documents:
                seen_from, seen = _overlap(self._place(document, length, self.rank), queries), _overlap(
                    self._place(document, length, other), keys)
                if seen_from[0] < seen_from[1] and seen[0] < seen[1]:
                    regions.append(Region(sequences, seen_from, seen, is_causal=other == self.rank))
        return tuple(regions)

    def _place(self, document: tuple[int, int], length: int, rank: int) -> tuple[int, int]:
        """First token and end of a document within a rank's part."""
        before = [sum(min(max(position - start, 0), end - start) for start, end in self.chunks(length, rank))
                  for position in document]
        return before[0], before[1]


# Sequences that are not split.
WHOLE = SequenceParts()


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    return max(one[0], other[0]), min(one[1], other[1])
