"""Which conversations share a sequence: whole ones, so that little of each sequence stays empty. No torch.

Best fit, the longest first: each conversation goes where it leaves the least room, or begins a sequence of its own.
Conversations of one length are taken in an order that a key draws, so that neighbours of the file do not stay
together. Which ones share a sequence is the same in every epoch. They do not see each other, so only the make-up of a
step depends on it.

Source: best-fit decreasing, as in Johnson, Near-optimal bin packing algorithms (MIT, 1973); the report (section 5.1)
says that samples are packed, and not how.

Legend: d documents.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dsv3_megatron.data.order import mix_array


@dataclass(frozen=True)
class Packing:
    """The conversations of each sequence.

    Attributes:
        order_d: int64, numbers of conversations, those of one sequence behind one another, the longest first.
        row_starts: int64, where the conversations of each sequence begin in `order_d`, then their number.
    """

    order_d: np.ndarray
    row_starts: np.ndarray

    def __len__(self) -> int:
        return len(self.row_starts) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.order_d[self.row_starts[row] : self.row_starts[row + 1]]


def pack_lengths(lengths_d: np.ndarray, capacity: int, *, key: int) -> Packing:
    """Pack conversations into sequences.

    Args:
        lengths_d: int64, tokens of each, 1..capacity.
        capacity: Tokens that a sequence holds.
        key: Drawn number that orders conversations of one length.

    Raises:
        AssertionError: a length is out of range.
    """
    assert not lengths_d.size or (lengths_d.min() >= 1 and lengths_d.max() <= capacity)
    drawn_d = mix_array(np.arange(lengths_d.size, dtype=np.uint64) ^ np.uint64(key))
    longest_first_d = np.lexsort((drawn_d, -lengths_d))
    rows_d = np.empty(lengths_d.size, dtype=np.int64)
    waiting: list[list[int]] = [[] for _ in range(capacity + 1)]  # sequences by the tokens that they still hold
    rooms = 0  # bit r is set where some sequence still holds r tokens
    num_rows = 0
    for place, length in enumerate(lengths_d[longest_first_d].tolist()):
        above = rooms >> length
        if above:
            room = length + (above & -above).bit_length() - 1
            row = waiting[room].pop()
            if not waiting[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, num_rows
            num_rows += 1
        rows_d[place] = row
        left = room - length
        if left:
            waiting[left].append(row)
            rooms |= 1 << left
    by_row_d = np.argsort(rows_d, kind="stable")
    row_starts = np.searchsorted(rows_d[by_row_d], np.arange(num_rows + 1))
    return Packing(longest_first_d[by_row_d], row_starts.astype(np.int64))
