"""Measures of balance against their definitions and their bounds."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_megatron.metrics.balance import bias_direction, dead_share, least_load, max_violation, normalised_entropy


def test_values() -> None:
    assert max_violation([20, 20, 20, 20]) == 0.0
    assert max_violation([30, 10, 20, 20]) == 0.5
    assert max_violation([0, 0, 0, 7]) == 3.0
    assert max_violation([8] * 8 + [0] * 248) == 256 / 8 - 1
    assert max_violation([0, 0]) == 0.0
    assert least_load([30, 10, 20, 20]) == 0.5
    assert least_load([0, 5]) == 0.0
    assert normalised_entropy([5, 5, 5, 5]) == pytest.approx(1.0)
    assert normalised_entropy([0, 7, 0, 7]) == pytest.approx(0.5)
    assert normalised_entropy([0, 0, 9]) == 0.0
    assert normalised_entropy([3]) == normalised_entropy([0, 0]) == 1.0
    assert dead_share([0, 1, 0, 7]) == 0.5
    assert dead_share([0, 0]) == 0.0
    assert bias_direction([0, 0, 0, 8]) == 0.5  # three biases up, one down
    assert bias_direction([2, 2, 2]) == 0.0
    assert bias_direction([1, 2, 3]) == 0.0


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=64).filter(any))
def test_is_the_definition(counts: list[int]) -> None:
    mean = statistics.fmean(counts)
    assert max_violation(counts) == pytest.approx((max(counts) - mean) / mean, rel=1e-12, abs=1e-12)
    assert 0 <= max_violation(counts) <= len(counts) - 1
    assert 0 <= least_load(counts) <= 1
    assert -1e-12 <= normalised_entropy(counts) <= 1 + 1e-12
    assert 0 <= dead_share(counts) < 1
    up, down = sum(mean > count for count in counts), sum(mean < count for count in counts)
    # The mean of large integers is rounded in floating point; the measure compares integers.
    if sum(counts) < 2**40:
        assert bias_direction(counts) == pytest.approx((up - down) / len(counts))


@pytest.mark.parametrize("function", [max_violation, least_load, normalised_entropy, dead_share, bias_direction])
def test_bad_counts(function: object) -> None:
    assert callable(function)
    with pytest.raises(ValueError, match="counts is empty"):
        function([])
    with pytest.raises(ValueError, match=r"counts=\[1, -1\] must not be negative"):
        function([1, -1])
