"""Softmax in place with its log-sum-exp, in the passes over memory that a row in cache allows."""

from __future__ import annotations

import torch


def softmax_and_logsumexp_(scores: torch.Tensor) -> torch.Tensor:
    """Replace each row of `scores` by its softmax and return the rows' log-sum-exp.

    logsumexp = max(scores) - log(max(softmax)): the largest probability is at least 1 / row length, so its logarithm
    is exact to rounding, where that of a small probability would not be. One exponential per element instead of two.

    Args:
        scores: fp32 or fp64 [..., D]; overwritten. A row may hold -inf, but not only -inf.

    Returns:
        [...] of the same dtype.
    """
    largest = scores.amax(dim=-1)
    torch.softmax(scores, dim=-1, out=scores)
    return largest.sub_(scores.amax(dim=-1).log_())
