"""Log-probabilities of answers that are there already, by a model that need not have drawn them.

A prompt goes through the model once, whatever the number of its answers; answers go behind it side by side, some tokens
of each at a time, and one that has ended leaves. The head sees the answers' tokens alone. With the cache that keeps
training's bits (cache.py) the log-probabilities have them, as those of a generation have.

Shapes: B rows, Q new tokens of a row, T tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dsv3_megatron.generation.cache import TrainingCache
from dsv3_megatron.generation.forward import CachedModel, Prompts

# Tokens that go through the layers at once, and scores of attention, of all answers and heads, that are in memory.
_TOKENS, _SCORES = 2048, 1 << 25


@torch.inference_mode()
def answer_logprobs(model: CachedModel, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], *,
                    batch_size: int) -> list[torch.Tensor]:
    """Log-probability of each answer's tokens behind its prompt, by the arithmetic of the training forward.

    Args:
        model: The model.
        prompts: Ids of the prompt of each answer, none empty.
        answers: Ids of each answer, none empty.
        batch_size: Answers that are in the cache at once.

    Returns:
        fp32 of each answer's tokens, in nats, in the order of the answers.
    """
    found: list[torch.Tensor] = [torch.empty(0)] * len(answers)
    # Answers of like length together: few wait for the longest.
    order = sorted(range(len(answers)), key=lambda number: (len(answers[number]), prompts[number]))
    for first in range(0, len(order), batch_size):
        numbers = order[first: first + batch_size]
        states = _states(model, [tuple(prompts[number]) for number in numbers], [answers[number] for number in numbers])
        tokens_T = torch.tensor([token for number in numbers for token in answers[number]], device=model.device)
        logprobs = [model.logprobs(rows_TH, tokens, least_rows=TrainingCache.least_rows) for rows_TH, tokens in zip(
            torch.cat(states).split(_TOKENS), tokens_T.split(_TOKENS), strict=True)]
        lengths = [len(answers[number]) for number in numbers]
        for number, values_T in zip(numbers, torch.cat(logprobs).float().split(lengths), strict=True):
            found[number] = values_T
    return found


def _states(model: CachedModel, prompts: Sequence[tuple[int, ...]], answers: Sequence[Sequence[int]]
            ) -> list[torch.Tensor]:
    """Hidden states that each answer's tokens follow from, [tokens, H] each."""
    packed, numbers = Prompts.pack_distinct(prompts, model.device)
    capacity = max(map(len, prompts)) + max(map(len, answers))
    cache = model.new_cache("training", num_rows=len(packed.lengths), capacity=capacity)
    last_BH = model.prefill(packed, cache)[packed.last_B()[numbers], 0]
    cache.keep(numbers)
    states = [[last_H.unsqueeze(0)] for last_H in last_BH]
    going, at = list(range(len(answers))), 0
    # The last token of an answer is followed by nothing.
    while left := [row for row in going if len(answers[row]) - 1 > at]:
        if len(left) < len(going):
            cache.keep([going.index(row) for row in left])
        going = left
        longest = max(len(answers[row]) for row in going) - 1 - at
        per_query = len(going) * model.config.num_attention_heads * capacity
        size = min(longest, max(1, min(_TOKENS // len(going), _SCORES // per_query)))
        # What stands behind a shorter answer is looked at by nothing that counts.
        parts = [list(answers[row][at: min(at + size, len(answers[row]) - 1)]) for row in going]
        tokens_BQ = torch.tensor([part + [0] * (size - len(part)) for part in parts], device=model.device)
        hidden_QBH = model.decode(tokens_BQ, [len(prompts[row]) + at for row in going], cache)
        for place, (row, part) in enumerate(zip(going, parts, strict=True)):
            states[row].append(hidden_QBH[:len(part), place])
        at += size
    return [torch.cat(parts) for parts in states]
