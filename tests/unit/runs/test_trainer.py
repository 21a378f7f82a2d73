"""How a micro-batch's token losses become the loss that is differentiated and the sums that are reported."""

from __future__ import annotations

import pytest
import torch

from dsv3_megatron.model.language_model import TokenLosses
from dsv3_megatron.model.losses import sum_losses


def test_sums_are_over_tokens_and_mtp_targets_follow_the_mask() -> None:
    main = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    depth_1, depth_2 = torch.tensor([[10.0, 20.0, 30.0, 0.0]]), torch.tensor([[100.0, 200.0, 0.0, 0.0]])
    # Token 3 (label of position 2) does not count: nor does it as a target of depth 1 at 1 and depth 2 at 0.
    mask = torch.tensor([[1.0, 1.0, 0.0, 1.0]])
    total, tokens, report = sum_losses(mask, TokenLosses(main, (depth_1, depth_2)), mtp_weight=0.3)
    assert tokens.item() == 3 and tokens.dtype == torch.int32
    assert report["sums"].tolist() == [3.0, 7.0, 10.0 + 30.0, 200.0]
    assert total.item() == pytest.approx(7.0 + 0.3 / 2 * (40.0 + 200.0))


def test_losses_may_come_back_as_a_plain_tuple() -> None:
    mask = torch.ones(1, 2)
    total, _, report = sum_losses(mask, (torch.ones(1, 2), ()), mtp_weight=0.3)  # type: ignore[arg-type]
    assert total.item() == 2.0 and report["sums"].tolist() == [2.0, 2.0]
