"""The objective equals its definition, written down answer by answer in float64, in value and gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from dsv3_megatron.config.policy import GRPO_LEVELS
from dsv3_megatron.post_training.objective import ObjectiveSettings, PolicyTokens, answers_of, policy_objective

# Documents of two rows of eleven labels: first positions of prompts with their answers, then of the filling.
BOUNDS = ((0, 4, 9, 11), (0, 6, 11))
# Labels that are an answer's tokens, by (row, first, stop); the document from 9 on is filling.
ANSWERS = ((0, 1, 4), (0, 6, 9), (1, 4, 6), (1, 7, 11))
ADVANTAGES = (1.2, -0.7, 0.0, -1.1)


def defined(answers: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], advantages: Sequence[float],
            settings: ObjectiveSettings) -> tuple[torch.Tensor, list[float]]:
    """The mean loss, and the means of divergence, clipping and ratio, by the formulas.

    Args:
        answers: Of each answer the log-probabilities of its tokens: now, at the rollout, by the reference.
        advantages: Of each answer.
        settings: Constants.
    """
    epsilon, losses, told = settings.clip_epsilon, [], []
    for values, advantage in zip(answers, advantages, strict=True):
        units = list(zip(*values, strict=True))
        if settings.level == "sequence":
            units = [tuple(sum(column) for column in zip(*units, strict=True))]
        of_units = []
        for now, then, frozen in units:
            ratio = torch.exp(now) / torch.exp(then)
            gain = torch.minimum(ratio * advantage, ratio.clip(1 - epsilon, 1 + epsilon) * advantage)
            quotient = torch.exp(frozen) / torch.exp(now)
            divergence = quotient - torch.log(quotient) - 1
            of_units.append(-(gain - settings.kl_coefficient * divergence))
            size = float(ratio.detach())
            lost = (size < 1 - epsilon and advantage < 0) or (size > 1 + epsilon and advantage > 0)
            share = 1.0 if settings.level != "answer" else 1 / len(units)
            told.append((float(divergence.detach()) * share, lost * share, size * share))
        losses += of_units if settings.level == "token" else [sum(of_units) / len(of_units)]
    return sum(losses) / len(losses), [math.fsum(column) / len(losses) for column in zip(*told, strict=True)]


@pytest.mark.parametrize("spread", [0.0, 0.02, 0.6])
@pytest.mark.parametrize("level", GRPO_LEVELS)
def test_equals_the_definition(level: str, spread: float) -> None:
    generator = torch.Generator().manual_seed(3)

    def near(values: torch.Tensor) -> torch.Tensor:
        return values + spread * torch.randn(values.shape, generator=generator, dtype=torch.float64)

    old = -torch.rand(2, 11, generator=generator, dtype=torch.float64) - 0.1
    reference, logprobs = near(old), near(old).requires_grad_()
    mask, advantages = torch.zeros(2, 11, dtype=torch.float64), torch.zeros(2, 11, dtype=torch.float64)
    for (row, first, stop), advantage in zip(ANSWERS, ADVANTAGES, strict=True):
        mask[row, first:stop], advantages[row, first:stop] = 1, advantage
    settings = ObjectiveSettings(level, 0.2, 0.3)
    tokens = PolicyTokens(mask, *answers_of(BOUNDS, mask.device), advantages, old, reference)
    loss, count, sums = policy_objective(logprobs, tokens, settings)
    expected, told = defined([tuple(values[row, first:stop] for values in (logprobs, old, reference))
                              for row, first, stop in ANSWERS], ADVANTAGES, settings)
    assert int(count) == (12 if level == "token" else 4) and count.dtype == torch.int
    torch.testing.assert_close(loss / count, expected, rtol=1e-12, atol=1e-14)
    assert (sums / count).tolist() == pytest.approx(told, rel=1e-12, abs=1e-14)
    if spread == 0.6:
        assert sums[1] > 0  # something is clipped, or the clipping is not seen
    (mine,) = torch.autograd.grad(loss / count, logprobs)
    (theirs,) = torch.autograd.grad(expected, logprobs)
    torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-13)
    assert not mine[mask == 0].any()


def test_a_row_without_answers_adds_nothing() -> None:
    zeros = torch.zeros(1, 5)
    tokens = PolicyTokens(zeros, *answers_of(((0, 5),), zeros.device), zeros, zeros, zeros)
    for level in GRPO_LEVELS:
        loss, count, sums = policy_objective(zeros.clone().requires_grad_(), tokens, ObjectiveSettings(level, 0.2, 0.1))
        assert loss.item() == 0 and int(count) == 0 and not sums.any()
        loss.backward()
