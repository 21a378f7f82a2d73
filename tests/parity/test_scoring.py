"""Log-probabilities of given answers against a whole forward pass over each, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dsv3_megatron.generation import scoring
from dsv3_megatron.generation.forward import CachedModel
from tests.parity.architectures import variant

PROMPTS = [[3, 1, 4], [1, 5], [3, 1, 4], [9, 2, 6, 5], [1, 5], [3]]
ANSWERS = [[5, 3, 5, 8, 9], [7], [9, 3], [2, 3, 8, 4, 6, 2, 6], [4, 3], [3, 8, 3]]


@pytest.mark.parametrize(("batch_size", "tokens"), [(6, 2048), (4, 2048), (1, 2048), (6, 12)])
def test_equals_a_forward_pass_over_each(build: Callable, batch_size: int, tokens: int,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """All at once, few at a time, and a few tokens of each at a time, so that answers leave on the way."""
    monkeypatch.setattr(scoring, "_TOKENS", tokens)
    model, _ = build(variant("groups", mtp_num_layers=0), torch.float64)
    found = scoring.answer_logprobs(CachedModel(model.eval()), PROMPTS, ANSWERS, batch_size=batch_size)
    for prompt, answer, logprobs in zip(PROMPTS, ANSWERS, found, strict=True):
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            logits_SV = model(input_ids=ids, position_ids=torch.arange(ids.shape[1])[None], attention_mask=None)[0]
        expected = logits_SV[len(prompt) - 1:-1].log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0]
        torch.testing.assert_close(logprobs, expected.float(), rtol=1e-6, atol=1e-6)
