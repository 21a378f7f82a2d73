"""What a rank's columns of the logits say of each token, and what all ranks' columns say together.

Letters: T tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class LocalScores(NamedTuple):
    """Scores of T tokens over some columns of the logits, in fp32 or fp64.

    Attributes:
        largest: Number subtracted before exponentials are taken: about the largest logit, at most its log-sum-exp.
        sums: Sum of exp(logit - largest).
        margins: The target's logit minus `largest`; 0 where the target is not among the columns.
    """

    largest: torch.Tensor
    sums: torch.Tensor
    margins: torch.Tensor

    def losses(self) -> torch.Tensor:
        """-log softmax[target] of each token, exact to rounding of the loss however large logits are."""
        return self.sums.log().sub_(self.margins)


def is_among(targets: torch.Tensor, columns: int) -> torch.Tensor:
    """Whether each target is one of the columns 0 .. columns - 1: bool [T]."""
    return (targets >= 0) & (targets < columns)


def over_ranks(scores: LocalScores, is_here: torch.Tensor, group: Any) -> LocalScores:
    """Scores over the columns of all of a group's ranks, by two all-reduces, of T and of 2 T numbers.

    Args:
        scores: Scores over this rank's columns.
        is_here: bool [T], whether the target is among them.
        group: The ranks, all of which call; None where one rank has all columns.
    """
    if group is None:
        return scores
    largest = scores.largest.clone()
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=group)
    lower = scores.largest - largest
    both = torch.stack([scores.sums * lower.exp(), torch.where(is_here, scores.margins + lower, 0.0)])
    torch.distributed.all_reduce(both, group=group)
    return LocalScores(largest, both[0], both[1])
