"""max_violation against its definition and its bounds."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_megatron.metrics.balance import least_load, max_violation


def test_values() -> None:
    assert max_violation([20, 20, 20, 20]) == 0.0
    assert max_violation([30, 10, 20, 20]) == 0.5
    assert max_violation([0, 0, 0, 7]) == 3.0
    assert max_violation([8] * 8 + [0] * 248) == 256 / 8 - 1
    assert max_violation([0, 0]) == 0.0
    assert least_load([30, 10, 20, 20]) == 0.5
    assert least_load([0, 5]) == 0.0


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=64).filter(any))
def test_is_the_definition(counts: list[int]) -> None:
    mean = statistics.fmean(counts)
    assert max_violation(counts) == pytest.approx((max(counts) - mean) / mean, rel=1e-12, abs=1e-12)
    assert 0 <= max_violation(counts) <= len(counts) - 1
    assert 0 <= least_load(counts) <= 1


@pytest.mark.parametrize("function", [max_violation, least_load])
def test_bad_counts(function: object) -> None:
    assert callable(function)
    with pytest.raises(ValueError, match="counts is empty"):
        function([])
    with pytest.raises(ValueError, match=r"counts=\[1, -1\] must not be negative"):
        function([1, -1])
