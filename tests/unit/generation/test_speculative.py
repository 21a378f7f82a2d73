"""The acceptance rule alone: its output's distribution, integrated over the uniform numbers."""

from __future__ import annotations

import pytest
import torch

from dsv3_megatron.generation.speculative import verify

GRID = 400  # points of each uniform number


def output_distribution(drafted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Probability of each first token that comes out, over drafts and both numbers."""
    middles = (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
    uniforms = torch.cartesian_prod(middles, middles)
    found = torch.zeros_like(target)
    for draft in range(len(drafted)):
        count = len(uniforms)
        after = torch.full((count, len(target)), 1.0, dtype=torch.float64)
        accepted, token = verify(torch.full((count,), draft), drafted.expand(count, -1), target.expand(count, -1),
                                 after, uniforms)
        first = torch.where(accepted, draft, token)
        found += drafted[draft] * torch.bincount(first, minlength=len(target)) / count
    return found


@pytest.mark.parametrize("drafted, target", [
    ([0.25, 0.25, 0.25, 0.25], [0.7, 0.1, 0.15, 0.05]), ([0.9, 0.1, 0.0, 0.0], [0.0, 0.0, 0.4, 0.6]),
    ([0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4]), ([1.0, 0.0, 0.0, 0.0], [0.5, 0.2, 0.2, 0.1]),
    ([0.0, 0.5, 0.5, 0.0], [0.3, 0.3, 0.0, 0.4]),
])
def test_what_comes_out_is_distributed_as_the_model_says(drafted: list[float], target: list[float]) -> None:
    found = output_distribution(torch.tensor(drafted, dtype=torch.float64), torch.tensor(target, dtype=torch.float64))
    # A cell of the grid more or less at each boundary.
    assert found.tolist() == pytest.approx(target, abs=4 / GRID)


def test_greedy_accepts_the_likeliest_token_alone() -> None:
    target = torch.eye(3, dtype=torch.float64)[[2, 1]]
    after = torch.eye(3, dtype=torch.float64)[[0, 2]]
    drafts = torch.tensor([2, 0])
    accepted, token = verify(drafts, torch.eye(3, dtype=torch.float64)[drafts], target, after,
                             torch.zeros(2, 2, dtype=torch.float64))
    assert accepted.tolist() == [True, False]
    assert token.tolist() == [0, 1]
