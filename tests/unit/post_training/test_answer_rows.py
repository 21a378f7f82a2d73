"""Answers in rows: each token has its own values at its label's position, whatever shares the row."""

from __future__ import annotations

import numpy as np

from dsv3_megatron.post_training.answer_rows import AnswerRows
from dsv3_megatron.post_training.objective import ADVANTAGES, OLD, REFERENCE
from tests.unit.post_training.test_rollout import answer


def test_each_label_has_its_tokens_values() -> None:
    answers = [answer(number, 0.0, tuple(range(8, 8 + length)), advantage=float(number + 1))
               for number, length in enumerate((2, 5, 3, 1))]
    rows = AnswerRows(answers, 14, filling=9, will_do=lambda number: number % 4 == 0)
    assert rows.num_rows == len(rows.samples()) == 4 and len(rows.packing) == 2
    found: dict[float, list[tuple[float, float, int]]] = {}
    for sample in map(rows.samples().__getitem__, range(4)):
        labels, mask, extras = sample["labels"], sample["loss_mask"], sample["extras"]
        assert labels.shape == mask.shape == (14,) and sample["document_bounds"][-1] == 14
        for at in np.flatnonzero(mask.numpy()):
            found.setdefault(float(extras[ADVANTAGES][at]), []).append(
                (float(extras[OLD][at]), float(extras[REFERENCE][at]), int(labels[at])))
        assert not any(values[mask == 0].any() for values in extras.values())
    for each in answers:
        assert each.reference_logprobs_T is not None
        assert found[each.advantage] == list(zip(each.logprobs_T.tolist(), each.reference_logprobs_T.tolist(), each.ids,
                                                 strict=True))
    assert not rows.samples()[3]["loss_mask"].any() and (rows.samples()[3]["tokens"] == 9).all()

    values = [rows.read(row).extras_S[OLD] for row in range(2)]
    for back, each in zip(rows.by_answer(values), answers, strict=True):
        assert back.tolist() == each.logprobs_T.tolist()


def test_without_a_reference_the_divergence_is_zero() -> None:
    rows = AnswerRows([answer(0, 0.0, reference_logprobs_T=None)], 8, filling=9, will_do=lambda number: True)
    extras = rows.read(0).extras_S
    assert np.array_equal(extras[OLD], extras[REFERENCE]) and extras[OLD].any()
