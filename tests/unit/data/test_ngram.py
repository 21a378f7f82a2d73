"""The n-gram baselines against a slow, obvious count, and against what is known of the text."""

import math
from collections import Counter

import numpy as np
import pytest

from dsv3_megatron.data.ngram import measure_ngram_baselines

VOCAB_SIZE = 12


def sample_markov_chain(rng, num_sequences, length, sharpness=1.0):
    """Sequences of a random first-order chain and the chain's transition matrix."""
    transition = np.random.default_rng(5).dirichlet(np.full(VOCAB_SIZE, sharpness), size=VOCAB_SIZE)
    cumulative = transition.cumsum(axis=1)
    sequences = np.zeros((num_sequences, length), dtype=np.int64)
    sequences[:, 0] = rng.integers(0, VOCAB_SIZE, num_sequences)
    for position in range(1, length):
        draws = rng.random(num_sequences)[:, None]
        sequences[:, position] = (draws > cumulative[sequences[:, position - 1]]).sum(axis=1)
    return sequences, transition


def score_slowly(train, valid, result, eod_id=None):
    """Both cross-entropies token by token, straight from the formulas."""
    pairs = Counter((a, b) for row in train.tolist() for a, b in zip(row, row[1:], strict=False))
    contexts, labels = Counter(), Counter()
    for (a, b), count in pairs.items():
        contexts[a] += count
        labels[b] += count
    total = sum(labels.values())

    def unigram(b, k):
        return (labels[b] + k) / (total + k * VOCAB_SIZE)

    def continuation(b, k):
        return (sum(1 for _, other in pairs if other == b) + k) / (len(pairs) + k * VOCAB_SIZE)

    lowest = math.inf
    lower = {"unigram": unigram, "continuation": continuation}[result.lower_order]
    unigram_nats = 0.0
    scored = [(a, b) for row in valid.tolist() for a, b in zip(row, row[1:], strict=False) if a != eod_id]
    for _, b in scored:
        unigram_nats -= math.log(unigram(b, result.add_k)) / len(scored)
    for k in (0.001, 0.01, 0.1, 0.5, 1.0):  # the lower order's k is not reported: one of these it was
        nats = 0.0
        for a, b in scored:
            if contexts[a]:
                types = sum(1 for first, _ in pairs if first == a)
                discounted = max(pairs[a, b] - result.discount, 0) / contexts[a]
                nats -= math.log(discounted + result.discount * types / contexts[a] * lower(b, k))
            else:
                nats -= math.log(lower(b, k))
        lowest = min(lowest, abs(nats / len(scored) - result.bigram_nats))
    return unigram_nats, lowest


@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("num_sequences", [1, 8])
def test_equals_the_slow_count(num_sequences, is_masked):
    rng = np.random.default_rng(0)
    train, _ = sample_markov_chain(rng, num_sequences, 30, sharpness=0.3)
    valid, _ = sample_markov_chain(rng, 4, 30, sharpness=0.3)
    eod_id = int(valid[0, 0]) if is_masked else None
    result = measure_ngram_baselines(train, valid, vocab_size=VOCAB_SIZE, eod_id=eod_id)
    unigram_nats, bigram_difference = score_slowly(train, valid, result, eod_id)
    assert result.unigram_nats == pytest.approx(unigram_nats, abs=1e-12)
    assert bigram_difference < 1e-12
    num_masked = int((valid[:, :-1] == eod_id).sum()) if is_masked else 0
    assert (result.num_train_tokens, result.num_valid_tokens) == (num_sequences * 29, 4 * 29 - num_masked)


def test_bigram_reaches_the_entropy_of_a_markov_chain():
    rng = np.random.default_rng(1)
    train, transition = sample_markov_chain(rng, 2000, 65)
    valid, _ = sample_markov_chain(rng, 500, 65)
    result = measure_ngram_baselines(train, valid, vocab_size=VOCAB_SIZE)
    true_nats = -np.log(transition[valid[:, :-1], valid[:, 1:]]).mean()
    assert true_nats - 1e-3 < result.bigram_nats < true_nats + 5e-3
    assert result.bigram_nats < result.unigram_nats - 0.2


def test_probabilities_sum_to_one():
    """Every label after one context, each scored alone: the probabilities add up, seen context or not."""
    train = np.array([[0, 1, 2, 1, 0, 1, 3, 3, 0, 2]] * 3)
    for context in (0, 11):
        nats = [
            measure_ngram_baselines(train, np.array([[context, label]]), vocab_size=VOCAB_SIZE).bigram_nats
            for label in range(VOCAB_SIZE)
        ]
        assert np.exp(-np.array(nats)).sum() == pytest.approx(1.0, abs=1e-12)


def test_tuning_is_no_worse_than_add_one():
    rng = np.random.default_rng(2)
    train, _ = sample_markov_chain(rng, 40, 33, sharpness=0.2)
    valid, _ = sample_markov_chain(rng, 200, 33, sharpness=0.2)
    counts = np.ones((VOCAB_SIZE, VOCAB_SIZE))
    np.add.at(counts, (train[:, :-1], train[:, 1:]), 1)
    add_one = counts / counts.sum(axis=1, keepdims=True)
    result = measure_ngram_baselines(train, valid, vocab_size=VOCAB_SIZE)
    assert result.bigram_nats <= -np.log(add_one[valid[:, :-1], valid[:, 1:]]).mean()


def test_errors():
    good = np.zeros((2, 5), dtype=np.int64)
    with pytest.raises(ValueError, match=r"train_QS1 has shape \(5,\), not \[sequences >= 1, seq_length \+ 1 >= 2\]"):
        measure_ngram_baselines(good[0], good, vocab_size=3)
    with pytest.raises(ValueError, match=r"valid_QS1 has shape \(0, 5\), not"):
        measure_ngram_baselines(good, good[:0], vocab_size=3)
    with pytest.raises(ValueError, match="valid_QS1 holds no token to score: each follows the EOD 0; use more valid"):
        measure_ngram_baselines(good, good, vocab_size=3, eod_id=0)
    with pytest.raises(ValueError, match=r"valid_QS1 holds ids 3\.\.3, outside 0\.\.vocab_size - 1 = 2"):
        measure_ngram_baselines(good, good + 3, vocab_size=3)
