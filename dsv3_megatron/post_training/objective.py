"""The objective of GRPO on packed answers: clipped ratios, less the divergence from a reference.

    J = mean over units of  min(rho A, clip(rho, 1 - eps, 1 + eps) A) - beta (r - log r - 1)
    rho = pi / pi_old    r = pi_ref / pi

A unit is an answer with its whole probability (level "sequence", the report's eq. 26 and 27 as they stand), or a token
with its own. Tokens are averaged over their answer and then over answers (level "answer": DeepSeekMath's eq. 3, TRL's
loss_type "grpo"), or over all of a step (level "token": TRL's "bnpo").

Shapes: B micro-batch, S sequence, d documents. What has no letters has an entry for each unit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dsv3_megatron.data.batches import Batch
from dsv3_megatron.model.language_model import TokenLosses
from dsv3_megatron.model.losses import sum_losses

ADVANTAGES, OLD, REFERENCE = "advantages", "old_logprobs", "reference_logprobs"
# Sums over units that `policy_objective` gives beside its value, as they are tagged once they are means.
REPORTED = ("grpo/kl", "grpo/clip-fraction", "grpo/ratio")


@dataclass(frozen=True)
class ObjectiveSettings:
    """Constants of the objective.

    Attributes:
        level: "sequence", "answer" or "token".
        clip_epsilon: Distance from 1 up to which a ratio counts, eps.
        kl_coefficient: Weight of the divergence, beta.
    """

    level: str
    clip_epsilon: float
    kl_coefficient: float


@dataclass(frozen=True)
class PolicyTokens:
    """Positions of a micro-batch with what their labels' answers brought along; fp32 [B, S] unless said otherwise.

    Attributes:
        mask_BS: 1 where the label is an answer's token.
        answers_BS: int64, number of each position's answer in the micro-batch.
        num_answers: Numbers that there are, those of prompts without tokens that count and of filling among them.
        advantages_BS: Advantage of the answer.
        old_BS: Log-probability of the label at the rollout, in nats.
        reference_BS: Log-probability of the label by the reference, in nats.
    """

    mask_BS: torch.Tensor
    answers_BS: torch.Tensor
    num_answers: int
    advantages_BS: torch.Tensor
    old_BS: torch.Tensor
    reference_BS: torch.Tensor

    def per_answer(self, values_BS: torch.Tensor) -> torch.Tensor:
        """Sums over each document's tokens that count, [d]."""
        zeros_d = values_BS.new_zeros(self.num_answers)
        return zeros_d.index_add(0, self.answers_BS.flatten(), (values_BS * self.mask_BS).flatten())


def policy_objective(logprobs_BS: torch.Tensor, tokens: PolicyTokens, settings: ObjectiveSettings
                     ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss of a micro-batch, summed over what it is to be divided by.

    Args:
        logprobs_BS: Log-probability of each label by the weights of the time, in nats; differentiated.
        tokens: What the labels' answers brought along.
        settings: Constants of the objective.

    Returns:
        The loss, -J times the count; the count, answers or tokens as the level says, int32; and the sums of REPORTED,
        fp64, which divided by the count of all micro-batches are means.

    Source: DeepSeek-V3 report, eq. 26-28.
    """
    # Differences first: their exponentials are near 1, those of log-probabilities far from it.
    to_old_BS, to_reference_BS = logprobs_BS - tokens.old_BS, tokens.reference_BS - logprobs_BS
    lengths_d = tokens.per_answer(torch.ones_like(tokens.mask_BS))
    if settings.level == "sequence":
        is_there = lengths_d > 0
        to_old, to_reference, advantages = (
            tokens.per_answer(values)[is_there] for values in (to_old_BS, to_reference_BS, tokens.advantages_BS))
        advantages = advantages / lengths_d[is_there]
        weights = torch.ones_like(advantages)
    else:
        is_counted = tokens.mask_BS.bool()
        to_old, to_reference, advantages = (
            values[is_counted] for values in (to_old_BS, to_reference_BS, tokens.advantages_BS))
        weights = torch.ones_like(advantages)
        if settings.level == "answer":
            weights = 1.0 / lengths_d[tokens.answers_BS[is_counted]]
    ratios = to_old.exp()
    clipped = ratios.clamp(1.0 - settings.clip_epsilon, 1.0 + settings.clip_epsilon)
    gains = torch.minimum(ratios * advantages, clipped * advantages)
    # expm1 keeps the digits of small differences.
    divergences = to_reference.expm1() - to_reference
    loss = -((gains - settings.kl_coefficient * divergences) * weights).sum()
    count = (tokens.mask_BS if settings.level == "token" else lengths_d > 0).sum()
    with torch.no_grad():
        is_clipped = ((ratios < 1.0 - settings.clip_epsilon) & (advantages < 0)) | (
            (ratios > 1.0 + settings.clip_epsilon) & (advantages > 0))
        sums = torch.stack([(values * weights).sum() for values in (divergences, is_clipped, ratios)]).double()
    return loss, count.to(torch.int), sums


def answers_of(bounds: tuple[tuple[int, ...], ...], device: torch.device) -> tuple[torch.Tensor, int]:
    """Number of each position's document in a micro-batch, int64 [B, S], and how many there are.

    Args:
        bounds: Bounds of the documents of each row.
        device: Device of the result.
    """
    rows, first = [], 0
    for row in bounds:
        rows.append(torch.repeat_interleave(torch.arange(len(row) - 1), torch.tensor(row).diff()) + first)
        first += len(row) - 1
    return torch.stack(rows).to(device, non_blocking=True), first


def packed_loss(batch: Batch, losses: TokenLosses, settings: ObjectiveSettings, *, mtp_weight: float
                ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """What a micro-batch of packed answers adds to the loss, as `model.losses.sum_losses` gives it of texts.

    MTP modules learn the answers' tokens as they learn texts, with their own weight; their mean is over tokens.

    Args:
        batch: Micro-batch of AnswerRows.
        losses: Losses of each of its positions.
        settings: Constants of the objective.
        mtp_weight: Weight of the MTP losses.
    """
    losses = TokenLosses(*losses)  # the bf16 wrapper rebuilds tuples without their names
    assert batch.document_bounds is not None
    answers_BS, num_answers = answers_of(batch.document_bounds, losses.main_BS.device)
    tokens = PolicyTokens(batch.loss_mask_BS, answers_BS, num_answers, batch.extras_BS[ADVANTAGES],
                          batch.extras_BS[OLD], batch.extras_BS[REFERENCE])
    loss, count, sums = policy_objective(-losses.main_BS, tokens, settings)
    texts, num_tokens, report = sum_losses(batch.loss_mask_BS, losses, mtp_weight=mtp_weight,
                                           sample_ids_B=batch.sample_ids_B)
    per_token = count / num_tokens.clamp_min(1)
    mtp = (texts - (losses.main_BS * batch.loss_mask_BS).sum()) * per_token
    own = torch.stack([count.double(), loss.detach().double()])
    report["sums"] = torch.cat([own, report["sums"][2:] * per_token, sums])
    return loss + mtp, count, report
