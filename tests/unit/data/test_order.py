"""The order of samples: permutations, turns of a blend, epochs that go over everything once for any length of run."""

from __future__ import annotations

import itertools
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_megatron.data.order import Permutation, Turns, derive_keys


def permutation(size: int, *numbers: int) -> Permutation:
    return Permutation(size, derive_keys("test", *numbers, count=8))


@pytest.mark.parametrize("size", [*range(1, 70), 100, 961, 1000, 5003])
def test_every_number_comes_once(size: int) -> None:
    assert sorted(permutation(size, 7)[place] for place in range(size)) == list(range(size))


def test_a_place_of_an_order_too_long_to_list() -> None:
    made = permutation(10**15, 1)
    found = [made[place] for place in range(5000)]
    assert len(set(found)) == 5000 and max(found) < 10**15
    # Uniform: the mean of 5000 of them lies within five of its standard deviations of the middle.
    assert abs(np.mean(found) / 10**15 - 0.5) < 5 / (12 * 5000) ** 0.5


@pytest.mark.parametrize("size", [5, 12, 13])
def test_orders_are_drawn_evenly(size: int) -> None:
    """Where each place goes, over 4000 keys, by Pearson's chi-squared with size - 1 degrees of freedom."""
    counts = np.zeros((size, size))
    pairs: Counter[tuple[int, int]] = Counter()
    for key in range(4000):
        made = permutation(size, key)
        order = [made[place] for place in range(size)]
        counts[range(size), order] += 1
        pairs[order[0], order[1]] += 1
    statistic = ((counts - 4000 / size) ** 2 / (4000 / size)).sum(axis=1)
    assert statistic.max() < size - 1 + 6 * (2 * (size - 1)) ** 0.5
    number = size * (size - 1)  # neighbours are independent of each other too
    assert sum((pairs[pair] - 4000 / number) ** 2 / (4000 / number)
               for pair in itertools.permutations(range(size), 2)) < number - 1 + 6 * (2 * number) ** 0.5


@settings(max_examples=40, deadline=None)
@given(st.lists(st.one_of(st.integers(1, 50), st.floats(1e-3, 10)), min_size=1, max_size=6))
def test_turns_are_even_and_none_is_left_out(weights: list[float]) -> None:
    turns, counts = Turns(weights), [0] * len(weights)
    shares = [Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]
    for place in range(300):
        number, before = turns[place]
        assert before == counts[number]
        counts[number] += 1
        assert all(abs(count - share * (place + 1)) < 2 for count, share in zip(counts, shares, strict=True))


def test_whole_weights_are_met_exactly() -> None:
    turns = Turns([5, 3, 1, 4])
    for start in (0, 13, 13 * 10**12):
        assert Counter(turns[place][0] for place in range(start, start + 13)) == {0: 5, 1: 3, 2: 1, 3: 4}
