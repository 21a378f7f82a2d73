"""What routers and heads note, against loops over tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dsv3_megatron.model.observation import NUM_SCORE_BINS, HeadAgreement, RouterObserver


class OneRank:
    """A tensor-parallel group of this process alone."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def agreement_of(num_depths: int, num_samples: int = 128) -> HeadAgreement:
    group: Any = OneRank()
    return HeadAgreement(num_depths, group, torch.device("cpu"), num_samples)


@pytest.mark.parametrize(("num_experts", "num_groups", "top_k"), [(8, 4, 3), (12, 3, 2), (6, 1, 4), (16, 16, 5)])
def test_a_router_is_counted_as_a_loop_would(num_experts: int, num_groups: int, top_k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    observer = RouterObserver(num_experts, num_groups, torch.device("cpu"))
    scores, per_group, by_number = [0] * NUM_SCORE_BINS, [0] * num_groups, [0] * (num_groups + 1)
    for num_tokens in (17, 40):
        scores_TE = torch.rand(num_tokens, num_experts, generator=generator)
        ids_TK = torch.rand(num_tokens, num_experts, generator=generator).topk(top_k).indices
        observer.observe(scores_TE, ids_TK)
        for score in scores_TE.flatten().tolist():
            scores[int(score * NUM_SCORE_BINS)] += 1
        for ids in ids_TK.tolist():
            groups = {expert // (num_experts // num_groups) for expert in ids}
            by_number[len(groups)] += 1
            for group in groups:
                per_group[group] += 1
    assert observer.score_counts_b.tolist() == scores
    assert observer.tokens_per_group_G.tolist() == per_group
    assert observer.tokens_by_num_groups.tolist() == by_number
    observer.clear()
    assert observer.score_counts_b.sum() == observer.tokens_per_group_G.sum() == 0


@pytest.mark.parametrize("is_isolated", [False, True])
def test_agreement_compares_the_same_place_in_the_text(is_isolated: bool) -> None:
    """Every position of a short sequence, against argmax position by position."""
    length, batch, width, vocab = 12, 3, 6, 5
    generator = torch.Generator().manual_seed(1)
    main_SBH, *mtp_SBH = torch.randn(3, length, batch, width, generator=generator)
    weight = torch.randn(vocab, width, generator=generator)
    remaining = torch.arange(length - 1, -1, -1)
    if is_isolated:  # documents of 5 and 7 positions
        remaining = torch.cat([torch.arange(4, -1, -1), torch.arange(6, -1, -1)]).expand(batch, -1)
    agreement = agreement_of(2)
    for depth in (1, 2):
        agreement.observe(depth, weight, main_SBH, mtp_SBH[depth - 1], remaining >= depth)
        agreeing = sampled = 0
        for row in range(batch):
            for position in range(length):
                left = int(remaining.expand(batch, -1)[row, position])
                if left >= depth:
                    draft = (mtp_SBH[depth - 1][position, row] @ weight.T).argmax()
                    agreeing += int(draft == (main_SBH[position + depth, row] @ weight.T).argmax())
                    sampled += 1
        assert agreement.counts[depth - 1].tolist() == [agreeing, sampled]
        assert 0 < agreeing < sampled


def test_agreement_samples_few_positions_of_the_first_micro_batch() -> None:
    hidden_SBH = torch.randn(64, 2, 8, generator=torch.Generator().manual_seed(2))
    shifted_SBH = hidden_SBH.roll(-1, 0)  # position i has the main head's state of position i + 1
    weight = torch.eye(8)
    has_target = torch.arange(64) < 63
    agreement = agreement_of(1, num_samples=20)
    agreement.observe(1, weight, hidden_SBH, shifted_SBH, has_target)
    agreement.observe(1, weight, hidden_SBH, -shifted_SBH, has_target)
    assert agreement.counts.tolist() == [[20, 20]]
    agreement.clear()
    agreement.observe(1, weight, hidden_SBH, -shifted_SBH, has_target)
    assert agreement.counts[0, 0] < 10 and agreement.counts[0, 1] == 20
