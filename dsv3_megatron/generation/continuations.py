"""Log-probabilities of continuations of texts: many sequences in one pass, nothing padded, nothing kept.

Continuations that are asked for behind the same tokens share one run over these: answers of one token, such as the
letters of a multiple choice, cost as much as one answer.

Shapes: T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.generation.cache import NoCache
from dsv3_megatron.generation.forward import CachedModel, Prompts

Ids = tuple[int, ...]


@dataclass(frozen=True)
class ContinuationRequest:
    """A continuation whose log-probability is asked for.

    Attributes:
        context: Ids before it, at least one.
        continuation: Ids of the continuation, at least one.
    """

    context: Ids
    continuation: Ids

    def inputs(self, max_length: int) -> Ids:
        """Ids that the model reads: all but the last one, as many of them as the context has room for."""
        return (self.context + self.continuation)[:-1][-max_length:]


@dataclass(frozen=True)
class ContinuationScore:
    """What a model says of a continuation.

    Attributes:
        logprob: Sum of its tokens' log-probabilities, in nats.
        is_greedy: Whether each token is the likeliest.
    """

    logprob: float
    is_greedy: bool


@dataclass(frozen=True)
class _Sequence:
    """Ids that the model runs over once, and the numbers of the requests that are scored behind them."""

    ids: Ids
    requests: tuple[int, ...]


def plan_batches(requests: Sequence[ContinuationRequest], *, max_length: int, batch_size: int | None
                 ) -> list[list[_Sequence]]:
    """The passes over a model that requests take, the longest sequences first.

    Args:
        requests: Continuations to score.
        max_length: Most tokens that the model reads, its context.
        batch_size: Sequences of a pass; None: as many as have `max_length` tokens together.

    Raises:
        ConfigError: a continuation, or what is before it, has no token, or does not fit into the context.
    """
    asked: dict[Ids, list[int]] = {}
    for number, request in enumerate(requests):
        if not request.context or not request.continuation:
            raise ConfigError(f"request {number + 1} asks for {len(request.continuation)} tokens behind "
                              f"{len(request.context)}; both need at least one")
        if len(request.continuation) > max_length:
            raise ConfigError(f"request {number + 1} asks for a continuation of {len(request.continuation)} tokens; "
                              f"the model's context has {max_length}")
        asked.setdefault(request.inputs(max_length), []).append(number)
    sequences = [_Sequence(ids, tuple(numbers)) for ids, numbers in asked.items()]
    sequences.sort(key=lambda sequence: (-len(sequence.ids), sequence.ids))
    if batch_size is not None:
        return [sequences[first: first + batch_size] for first in range(0, len(sequences), batch_size)]
    batches: list[list[_Sequence]] = []
    room = 0
    for sequence in sequences:
        if len(sequence.ids) > room:
            batches.append([])
            room = max_length
        batches[-1].append(sequence)
        room -= len(sequence.ids)
    return batches


def score_batches(model: CachedModel, requests: Sequence[ContinuationRequest], batches: Iterable[Sequence[_Sequence]],
                  report: Callable[[int], None] = lambda count: None) -> dict[int, ContinuationScore]:
    """The scores of the requests in some batches, by the requests' numbers.

    Args:
        model: The model.
        requests: Continuations to score.
        batches: Passes, those of `plan_batches` or some of them.
        report: Hears of each pass how many requests it has answered.

    Raises:
        ConfigError: a log-probability is no finite number.
    """
    found: dict[int, ContinuationScore] = {}
    for batch in batches:
        scores = _score_batch(model, requests, batch)
        found.update(scores)
        report(len(scores))
    return found


@torch.inference_mode()
def _score_batch(model: CachedModel, requests: Sequence[ContinuationRequest], batch: Sequence[_Sequence]
                 ) -> dict[int, ContinuationScore]:
    prompts = Prompts.pack([sequence.ids for sequence in batch], model.device)
    hidden_TH = model.prefill(prompts, NoCache())[:, 0]
    places: list[int] = []
    targets: list[int] = []
    numbers: list[int] = []
    for sequence, end in zip(batch, prompts.bounds[1:], strict=True):
        for number in sequence.requests:
            continuation = requests[number].continuation
            places += range(end - len(continuation), end)
            targets += continuation
            numbers.append(number)
    logprobs_T, is_likeliest_T = model.scores(hidden_TH[torch.tensor(places, device=model.device)],
                                              torch.tensor(targets, device=model.device))
    lengths = [len(requests[number].continuation) for number in numbers]
    found = {}
    for number, logprobs, likeliest in zip(numbers, logprobs_T.double().cpu().split(lengths),
                                           is_likeliest_T.cpu().split(lengths), strict=True):
        total = float(logprobs.sum())
        if not math.isfinite(total):
            raise ConfigError(f"the log-probability of request {number + 1} is {total}, in {model.dtype}: the weights "
                              "are damaged or the values overflow; try --precision fp32, or another checkpoint")
        found[number] = ContinuationScore(total, bool(likeliest.all()))
    return found
