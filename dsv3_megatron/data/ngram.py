"""Unigram and bigram baselines: what a model must beat to have learned more than counts.

Both are counted on the very tokens a run trained on and scored on validation tokens, in nats per token, so the numbers
stand beside the run's losses. The bigram is made strong on purpose: absolute discounting interpolated with a
lower-order distribution (Ney, Essen, Kneser 1994), where the discount and the kind of lower order (plain unigram, or
Kneser and Ney's continuation counts) are chosen on a held-out part of the training tokens, then counted on all of them.

    P(b | a) = max(c(ab) - D, 0) / c(a) + (D * types(a) / c(a)) * P_low(b),   P(b | a) = P_low(b) where c(a) = 0
    P_uni(b) = (c(b) + k) / (T + k V)

Legend: S sequence length, V vocabulary, u distinct bigrams.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_DISCOUNTS = (0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
_ADD_K = (0.001, 0.01, 0.1, 0.5, 1.0)
_HELD_OUT_SHARE = 0.05


@dataclass(frozen=True)
class NgramBaselines:
    """Cross-entropies on the validation tokens (nats per token), and what the tuning chose."""

    unigram_nats: float
    bigram_nats: float
    add_k: float
    discount: float
    lower_order: str
    num_train_tokens: int
    num_valid_tokens: int


@dataclass(frozen=True)
class _Counts:
    next_V: np.ndarray  # how often each id is a label
    context_V: np.ndarray  # how often each id is an input
    keys_u: np.ndarray  # sorted a * V + b of the distinct bigrams
    counts_u: np.ndarray

    @property
    def vocab_size(self) -> int:
        return self.next_V.size


def _count(sequences_QS1: np.ndarray, vocab_size: int) -> _Counts:
    inputs = sequences_QS1[:, :-1].ravel().astype(np.int64)
    labels = sequences_QS1[:, 1:].ravel().astype(np.int64)
    keys_u, counts_u = np.unique(inputs * vocab_size + labels, return_counts=True)
    next_V = np.bincount(labels, minlength=vocab_size)
    return _Counts(next_V, np.bincount(inputs, minlength=vocab_size), keys_u, counts_u)


def _unigram_probabilities(counts: _Counts, add_k: float) -> np.ndarray:
    return (counts.next_V + add_k) / (counts.next_V.sum() + add_k * counts.vocab_size)


def _lower_order(counts: _Counts, kind: str, add_k: float) -> np.ndarray:
    if kind == "unigram":
        return _unigram_probabilities(counts, add_k)
    continuations_V = np.bincount(counts.keys_u % counts.vocab_size, minlength=counts.vocab_size)
    return (continuations_V + add_k) / (continuations_V.sum() + add_k * counts.vocab_size)


class _BigramScorer:
    """Looks the scored tokens up once; each setting of the smoothing is then a few array operations."""

    def __init__(self, counts: _Counts, sequences_QS1: np.ndarray, eod_id: int | None = None) -> None:
        self._counts = counts
        inputs, self._labels = (tokens.astype(np.int64) for tokens in _scored_pairs(sequences_QS1, eod_id))
        keys = inputs * counts.vocab_size + self._labels
        positions = np.minimum(np.searchsorted(counts.keys_u, keys), counts.keys_u.size - 1)
        self._pair_counts = np.where(counts.keys_u[positions] == keys, counts.counts_u[positions], 0)
        self._context_counts = counts.context_V[inputs]
        types_V = np.bincount(counts.keys_u // counts.vocab_size, minlength=counts.vocab_size)
        self._types = types_V[inputs]

    def cross_entropy(self, discount: float, lower_V: np.ndarray) -> float:
        lower = lower_V[self._labels]
        total = np.maximum(self._context_counts, 1)
        backed_off = np.where(self._context_counts > 0, discount * self._types / total, 1.0)
        return float(-np.log(np.maximum(self._pair_counts - discount, 0) / total + backed_off * lower).mean())


def _scored_pairs(sequences_QS1: np.ndarray, eod_id: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels that are scored, flat."""
    inputs, labels = sequences_QS1[:, :-1].ravel(), sequences_QS1[:, 1:].ravel()
    return (inputs, labels) if eod_id is None else (inputs[inputs != eod_id], labels[inputs != eod_id])


def _unigram_cross_entropy(
    counts: _Counts, sequences_QS1: np.ndarray, add_k: float, eod_id: int | None = None
) -> float:
    _, labels = _scored_pairs(sequences_QS1, eod_id)
    return float(-np.log(_unigram_probabilities(counts, add_k)[labels]).mean())


def _check(sequences_QS1: np.ndarray, vocab_size: int, name: str) -> np.ndarray:
    sequences_QS1 = np.asarray(sequences_QS1)
    if sequences_QS1.ndim != 2 or sequences_QS1.shape[0] < 1 or sequences_QS1.shape[1] < 2:
        raise ValueError(f"{name} has shape {sequences_QS1.shape}, not [sequences >= 1, seq_length + 1 >= 2]")
    smallest, largest = int(sequences_QS1.min()), int(sequences_QS1.max())
    if smallest < 0 or largest >= vocab_size:
        raise ValueError(f"{name} holds ids {smallest}..{largest}, outside 0..vocab_size - 1 = {vocab_size - 1}")
    return sequences_QS1


def measure_ngram_baselines(
    train_QS1: np.ndarray, valid_QS1: np.ndarray, *, vocab_size: int, eod_id: int | None = None
) -> NgramBaselines:
    """Count both models on training sequences and score them on validation sequences.

    Args:
        train_QS1: Integer ids [sequences, seq_length + 1], the tokens a run consumed (`batches.read_token_sequences`).
        valid_QS1: Validation ids, in as many axes; scored are all tokens but the first of each sequence.
        vocab_size: Ids lie in 0..vocab_size - 1, and the models give each of them probability.
        eod_id: The EOD of a run that masks the loss after one: validation tokens that follow it are not scored either.

    Returns:
        Cross-entropies in nats per token, and the settings chosen on the last 5% of the training sequences (with one
        sequence only, on itself cut in two).

    Raises:
        ValueError: wrong shapes, ids outside the vocabulary, or no validation token to score.

    Source: Ney, Essen, Kneser 1994; Chen and Goodman 1998, section 2.7. Differs in the tuning named above.
    """
    train_QS1 = _check(train_QS1, vocab_size, "train_QS1")
    valid_QS1 = _check(valid_QS1, vocab_size, "valid_QS1")
    num_valid_tokens = _scored_pairs(valid_QS1, eod_id)[1].size
    if not num_valid_tokens:
        raise ValueError(f"valid_QS1 holds no token to score: each follows the EOD {eod_id}; use more validation data")
    if len(train_QS1) > 1:
        num_held_out = max(1, int(len(train_QS1) * _HELD_OUT_SHARE))
        kept, held_out = train_QS1[:-num_held_out], train_QS1[-num_held_out:]
    else:
        middle = max(1, train_QS1.shape[1] // 2)
        kept, held_out = train_QS1[:, : middle + 1], train_QS1[:, middle - 1 :]
    counts = _count(kept, vocab_size)
    add_k = min(_ADD_K, key=lambda k: _unigram_cross_entropy(counts, held_out, k))
    scorer = _BigramScorer(counts, held_out)
    settings = [
        (scorer.cross_entropy(discount, lower_V), discount, kind, k)
        for kind in ("unigram", "continuation")
        for k in _ADD_K
        for lower_V in [_lower_order(counts, kind, k)]
        for discount in _DISCOUNTS
    ]
    _, discount, kind, lower_k = min(settings)
    counts = _count(train_QS1, vocab_size)
    scorer = _BigramScorer(counts, valid_QS1, eod_id)
    return NgramBaselines(
        unigram_nats=_unigram_cross_entropy(counts, valid_QS1, add_k, eod_id),
        bigram_nats=scorer.cross_entropy(discount, _lower_order(counts, kind, lower_k)),
        add_k=add_k,
        discount=discount,
        lower_order=kind,
        num_train_tokens=train_QS1[:, 1:].size,
        num_valid_tokens=num_valid_tokens,
    )
