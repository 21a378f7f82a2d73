"""ops/rotary_frequencies.py: the formula in plain Python, and YaRN at its two ends and between them."""

import math

import pytest

from dsv3_megatron.ops.rotary_frequencies import plain_frequencies, yarn_frequencies

V3 = {"factor": 40.0, "original_length": 4096, "beta_fast": 32.0, "beta_slow": 1.0}


@pytest.mark.parametrize(("dim", "base"), [(2, 10000.0), (64, 10000.0), (10, 500.0)])
def test_plain(dim, base):
    assert plain_frequencies(dim, base).tolist() == pytest.approx([base ** (-2 * i / dim) for i in range(dim // 2)])


def turns(frequency, length):
    """How often a pair turns within a context."""
    return frequency * length / (2 * math.pi)


def test_yarn_keeps_fast_pairs_and_divides_slow_ones():
    plain, extended = plain_frequencies(64, 10000.0).tolist(), yarn_frequencies(64, 10000.0, **V3).tolist()
    kept = [i for i, (a, b) in enumerate(zip(plain, extended, strict=True)) if b == pytest.approx(a, rel=1e-12)]
    divided = [i for i, (a, b) in enumerate(zip(plain, extended, strict=True)) if b == pytest.approx(a / 40, rel=1e-12)]
    between = sorted(set(range(32)) - set(kept) - set(divided))
    # The ramp begins at the last whole pair above beta_fast turns and ends at the first below beta_slow.
    assert all(turns(plain[i], 4096) >= 32 for i in kept) and all(turns(plain[i], 4096) <= 1 for i in divided)
    assert kept == list(range(11)) and between == list(range(11, 23)) and divided == list(range(23, 32))
    shares = [(1 - extended[i] / plain[i]) / (1 - 1 / 40) for i in between]
    assert [b - a for a, b in zip(shares, shares[1:], strict=False)] == pytest.approx([1 / 13] * (len(shares) - 1))


def test_a_factor_of_one_changes_nothing():
    assert yarn_frequencies(64, 10000.0, **{**V3, "factor": 1.0}).tolist() == pytest.approx(
        plain_frequencies(64, 10000.0).tolist())


def test_a_context_in_which_no_pair_turns():
    """Both ends of the ramp are the first pair: it is no division by nothing, and every other pair is slow."""
    found = yarn_frequencies(8, 10000.0, factor=4.0, original_length=4, beta_fast=32.0, beta_slow=1.0)
    plain = plain_frequencies(8, 10000.0)
    assert found.isfinite().all() and found[1:].tolist() == pytest.approx((plain[1:] / 4).tolist())
