"""A bounded sample of a corpus in one pass, spread over all of it, and texts held out from it.

Each text has a random number that is its own (keyed_random.py); the texts with the smallest numbers are the sample.
That is uniform over the documents, needs no count of them beforehand, holds no more than the sample in memory, and does
not depend on the order of files or documents. Equal texts go the same way, so none is both in the sample and held out.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator

from dsv3_megatron.data.transforms.keyed_random import DocumentRandom, check_probability, threshold_of


class TextSample:
    """The texts of the smallest numbers, as few as reach `max_bytes` UTF-8 bytes: the last may go past it.

    Args:
        max_bytes: Bound on the sample.
        seed: Chooses the sample.
        purpose: What the numbers are drawn for, as for `DocumentRandom`: other purposes have other numbers.

    Raises:
        ValueError: max_bytes below 1, or a seed out of range.
    """

    def __init__(self, max_bytes: int, *, seed: int, purpose: str) -> None:
        if max_bytes < 1:
            raise ValueError(f"max_bytes={max_bytes} must be at least 1; try 100000000")
        self.num_bytes = 0
        self._max_bytes = max_bytes
        self._random = DocumentRandom(seed, purpose)
        self._heap: list[tuple[int, bytes]] = []  # largest number first, hence its negative

    def add(self, text: str) -> list[str]:
        """Consider one text; returns those that are out for good: none, the text itself, or others in its place."""
        data = text.encode("utf-8")
        heapq.heappush(self._heap, (-self._random.draw(data, 1)[0], data))
        self.num_bytes += len(data)
        dropped = []
        # What is dropped has smaller numbers before it that reach the bound, now and later: the order cannot matter.
        while self.num_bytes - len(self._heap[0][1]) >= self._max_bytes:
            data = heapq.heappop(self._heap)[1]
            self.num_bytes -= len(data)
            dropped.append(data.decode("utf-8"))
        return dropped

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[str]:
        """The sample, smallest number first, whatever the order in which it came."""
        return (data.decode("utf-8") for _, data in sorted(self._heap, reverse=True))


def hold_out(texts: Iterable[str], held_out: TextSample, *, share: float, seed: int) -> Iterator[str]:
    """Put a share of the texts into `held_out`, as far as it has room, and yield all the others.

    Args:
        texts: Any texts, in any order.
        held_out: Complete when the iteration has ended.
        share: Probability of each text.
        seed: Chooses the texts.

    Raises:
        ValueError: share is no probability.
    """
    check_probability("share", share)
    random, threshold = DocumentRandom(seed, "hold out"), threshold_of(share)
    for text in texts:
        if random.draw(text, 1)[0] < threshold:
            yield from held_out.add(text)
        else:
            yield text
