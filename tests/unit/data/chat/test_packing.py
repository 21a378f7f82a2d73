"""Packing: every conversation once, none cut, sequences as full as a slow best fit makes them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_megatron.data.chat.packing import pack_lengths


def slow_best_fit(lengths, capacity):
    """Tokens in each sequence, by trying every sequence for every conversation, the longest first."""
    filled = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row, used in enumerate(filled) if used + length <= capacity]
        if not fitting:
            filled.append(length)
            continue
        filled[max(fitting, key=lambda row: filled[row])] += length
    return sorted(filled)


@settings(max_examples=200)
@given(st.integers(1, 40).flatmap(lambda size: st.tuples(st.just(size), st.lists(st.integers(1, size), max_size=60))))
def test_each_conversation_is_in_one_sequence_as_best_fit_has_it(case):
    capacity, lengths = case
    packing = pack_lengths(np.array(lengths, dtype=np.int64), capacity, key=5)
    rows = [packing[row].tolist() for row in range(len(packing))]
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    assert sorted(sum(lengths[number] for number in row) for row in rows) == slow_best_fit(lengths, capacity)
    for row in rows:
        assert [lengths[number] for number in row] == sorted((lengths[number] for number in row), reverse=True)


def test_the_key_draws_who_shares_a_sequence():
    lengths = np.full(100, 4)
    one, same, other = (pack_lengths(lengths, 8, key=key) for key in (1, 1, 2))
    assert len(one) == 50 and np.array_equal(one.order_d, same.order_d)
    assert not np.array_equal(one.order_d, other.order_d) and not np.array_equal(one.order_d, np.arange(100))


def test_a_length_that_does_not_fit_is_ours_to_prevent():
    with pytest.raises(AssertionError):
        pack_lengths(np.array([9]), 8, key=0)
