"""Answers in rows: each token has its own values at its label's position, whatever shares the row."""

from __future__ import annotations

import numpy as np
import pytest

from dsv3_megatron.post_training.answer_rows import AnswerRows
from dsv3_megatron.post_training.objective import ADVANTAGES, OLD, REFERENCE
from tests.unit.post_training.test_rollout import answer


@pytest.mark.parametrize("num_repeated", [None, 1, 3, 4])
def test_each_label_has_its_tokens_values(num_repeated: int | None) -> None:
    answers = [answer(number, 0.0, tuple(range(8, 8 + length)), advantage=float(number + 1))
               for number, length in enumerate((2, 5, 3, 1))]
    rows = AnswerRows(answers, 14, filling=9, will_do=lambda number: number % 4 == 0, num_repeated=num_repeated)
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


@pytest.mark.parametrize(("num_repeated", "num_rows"), [(None, 3), (1, 2), (2, 3)])
def test_a_shared_prompt_is_there_once_in_a_row(num_repeated: int | None, num_rows: int) -> None:
    answers = [answer(group, 0.0, tuple(range(10 * group, 10 * group + 3)), prompt_ids=(group, 50, 51, 52, 53))
               for group in (1, 1, 2, 1, 1, 2)]
    rows = AnswerRows(answers, 19, filling=9, will_do=lambda number: True, num_repeated=num_repeated)
    assert rows.num_rows == num_rows
    seen = []
    for sample in map(rows.samples().__getitem__, range(rows.num_rows)):
        tokens, positions = sample["tokens"].tolist(), sample["position_ids"].tolist()
        bounds = sample["document_bounds"]
        continued = sample["continued"] or tuple(range(len(bounds) - 1))
        assert len(continued) == len(bounds) - 1
        for number, before in enumerate(continued):
            whole = range(bounds[number], bounds[number + 1])
            whole = [*range(bounds[before], bounds[before + 1]), *whole] if before != number else list(whole)
            assert [positions[at] for at in whole] == list(range(len(whole)))
            if sample["loss_mask"][whole].any():
                seen.append([tokens[at] for at in whole])
        assert num_repeated is None or sum(token in (1, 2) for token in tokens) == len({*tokens} & {1, 2})
    expected = [[*each.prompt_ids, *each.ids] for each in answers]
    # The token after a row's last position is no input.
    assert len(seen) == len(expected) and all(ids in expected or ids in [all_but[:-1] for all_but in expected]
                                              for ids in seen)
