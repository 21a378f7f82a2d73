"""A sample is bounded, spread over the corpus, and the same in any order."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_megatron.data.text_sample import TextSample, hold_out


def sample_of(texts, max_bytes, seed=0):
    sample = TextSample(max_bytes, seed=seed, purpose="test")
    dropped = [text for added in texts for text in sample.add(added)]
    return list(sample), dropped


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=12)), st.integers(1, 60), st.randoms())
def test_the_order_makes_no_difference_and_nothing_is_lost(texts, max_bytes, shuffler):
    kept, dropped = sample_of(texts, max_bytes)
    assert Counter(kept) + Counter(dropped) == Counter(texts)
    sizes = [len(text.encode()) for text in kept]
    assert sum(sizes[:-1]) < max_bytes
    assert not dropped or sum(sizes) >= max_bytes
    shuffled = list(texts)
    shuffler.shuffle(shuffled)
    assert sample_of(shuffled, max_bytes)[0] == kept


def test_a_sample_is_spread_over_all_texts():
    texts = [f"{i:05d}" for i in range(10_000)]
    kept, _ = sample_of(texts, 5 * 1000)
    assert len(kept) == 1000
    tenths = Counter(int(text) // 1000 for text in kept)
    assert sum((tenths[k] - 100) ** 2 / 100 for k in range(10)) < 27.9  # chi-square, 9 degrees: p = 0.001
    assert set(kept) != set(sample_of(texts, 5 * 1000, seed=1)[0])


def test_held_out_texts_are_a_share_and_apart():
    texts = [f"text {i % 4000}" for i in range(5000)]
    random.Random(0).shuffle(texts)
    held_out = TextSample(10**6, seed=3, purpose="held out")
    rest = list(hold_out(texts, held_out, share=0.1, seed=3))
    assert Counter(rest) + Counter(held_out) == Counter(texts)
    assert not set(rest) & set(held_out)
    assert abs(len(set(held_out)) - 400) < 4 * (4000 * 0.1 * 0.9) ** 0.5
    small = TextSample(50, seed=3, purpose="held out")
    rest = list(hold_out(texts, small, share=0.1, seed=3))  # what has no room goes on
    assert Counter(rest) + Counter(small) == Counter(texts) and 0 < len(small) <= 10


def test_errors():
    with pytest.raises(ValueError, match=r"max_bytes=0 must be at least 1; try 100000000"):
        TextSample(0, seed=0, purpose="test")
    with pytest.raises(ValueError, match=r"share=2 must be a probability"):
        list(hold_out([], TextSample(1, seed=0, purpose="test"), share=2, seed=0))
