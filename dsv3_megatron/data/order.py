"""The order of samples as arithmetic: a keyed permutation, and who of several datasets is next. No torch.

Nothing is built before the first sample and nothing is kept: the n-th place of an order is computed from n. So an order
does not depend on how much of it a run will use, and costs no memory however long it is.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Protocol

import numpy as np

_MASK = (1 << 64) - 1
_NUM_ROUNDS = 8


def mix(value: int) -> int:
    """A 64-bit number whose every bit depends on every bit of another, one to one.

    Source: Steele, Lea and Flood, Fast splittable pseudorandom number generators (OOPSLA 2014), mix64variant13.
    """
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def mix_array(values: np.ndarray) -> np.ndarray:
    """Mix each of some uint64 as `mix` does."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def derive_keys(purpose: str, *numbers: int, count: int) -> tuple[int, ...]:
    """Up to eight 64-bit keys that belong to a purpose and some numbers, such as a seed and an epoch."""
    digest = hashlib.blake2b(":".join((purpose, *map(str, numbers))).encode(), digest_size=64).digest()
    return tuple(int.from_bytes(digest[start : start + 8], "little") for start in range(0, 8 * count, 8))


class Permutation:
    """A permutation of 0..size - 1 chosen by keys, computed place by place.

    A Feistel network on pairs of digits: each round adds to one digit a keyed function of the other. The pairs are a
    few more than `size`; a place that leaves the range is permuted again until it is back in it.

    Args:
        size: Number of places, at least 1.
        keys: Eight keys that `derive_keys` gave.

    Source: Black and Rogaway, Ciphers with arbitrary finite domains (CT-RSA 2002), section 4 and "cycle walking".
    """

    def __init__(self, size: int, keys: Sequence[int]) -> None:
        assert size >= 1 and len(keys) == _NUM_ROUNDS
        self.size, self.keys = size, tuple(keys)
        self._rows = math.isqrt(size - 1) + 1
        self._columns = -(-size // self._rows)

    def __getitem__(self, index: int) -> int:
        """Find where the number at a place goes."""
        if not 0 <= index < self.size:
            raise IndexError(f"{index} is not in 0..{self.size - 1}")
        rows, columns = self._rows, self._columns
        while True:
            left, right = divmod(index, columns)
            for first, second in zip(self.keys[::2], self.keys[1::2], strict=True):
                left = (left + mix(right ^ first)) % rows
                right = (right + mix(left ^ second)) % columns
            index = left * columns + right
            if index < self.size:
                return index


class SampleSource(Protocol):
    """Something that gives samples by their numbers, such as one shuffled dataset."""

    def read(self, index: int) -> Any:
        """The sample at an index."""
        ...


class InTurns[Part: SampleSource]:
    """The samples of several datasets, each in its own order, in turns by weight.

    Args:
        parts: The datasets.
        weights: Shares of the samples that the datasets have, on any scale.
    """

    def __init__(self, parts: Sequence[Part], weights: Sequence[float]) -> None:
        self.parts, self._turns = tuple(parts), Turns(weights)

    def read(self, index: int) -> Any:
        """The sample at an index, as the dataset whose turn it is gives it."""
        number, turn = self._turns[index]
        return self.parts[number].read(turn)


class Turns:
    """Which of several streams each place of a blend is taken from: evenly, in proportion to their weights.

    After any number of places a stream has been taken as often as its share says, give or take a place or two; with
    whole numbers as weights, exactly as often after as many places as they add up to. The first streams of a blend are
    taken apart from the rest one by one, each by the same straight line.

    Args:
        weights: Positive numbers, taken as they are in binary; of any scale.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        exact = [Fraction(weight) for weight in weights]
        shares = [weight / sum(exact[number:]) for number, weight in enumerate(exact)]
        self._shares = [(share.numerator, share.denominator) for share in shares]

    def __getitem__(self, place: int) -> tuple[int, int]:
        """The stream that a place is taken from, and how often it was taken from before."""
        for number, (numerator, denominator) in enumerate(self._shares):
            before = (2 * place * numerator + denominator) // (2 * denominator)
            if (2 * (place + 1) * numerator + denominator) // (2 * denominator) > before:
                return number, before
            place -= before
        raise AssertionError("the last stream takes what is left")
