"""Softmax in place with its log-sum-exp, in the passes over memory that a row in cache allows."""

from __future__ import annotations

import torch

# Entries of torch's widest vector on a CPU. A row of fewer is summed one after the other, a longer one by lanes.
_LEAST_WIDTH = 16


def softmax_(scores: torch.Tensor) -> torch.Tensor:
    """Replace each row of `scores` by its softmax, and return it; bits do not depend on what is masked behind a row.

    A token's attention looks at as many positions as there are when it is generated, and at masked ones behind it in
    training. So rows of fewer entries than a vector are computed with masked ones behind them too.

    Args:
        scores: fp32 or fp64 [..., D]; overwritten. A row may hold -inf, but not only -inf.
    """
    width = scores.shape[-1]
    if width >= _LEAST_WIDTH or scores.device.type != "cpu":
        return torch.softmax(scores, dim=-1, out=scores)
    wide = torch.nn.functional.pad(scores, (0, _LEAST_WIDTH - width), value=float("-inf"))
    return scores.copy_(torch.softmax(wide, dim=-1)[..., :width])


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
    softmax_(scores)
    return largest.sub_(scores.amax(dim=-1).log_())
