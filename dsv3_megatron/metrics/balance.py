"""How evenly the tokens of a step are spread over a layer's experts.

Usage:
    max_violation([30, 10, 20, 20])     # 0.5: the fullest expert got 1.5 times its share
"""

from __future__ import annotations

from collections.abc import Sequence


def max_violation(counts: Sequence[int]) -> float:
    """Relative excess of the fullest expert over the mean: max(counts) / mean(counts) - 1.

    Args:
        counts: Tokens routed to each expert of one layer, summed over everything that was routed in the
            step (all micro-batches and data-parallel ranks gives MaxVio_global of the paper, one
            micro-batch MaxVio_batch). Entries sum to tokens x top-k.

    Returns:
        0 at perfect balance; num_experts / top_k - 1 when every token goes to the same top-k experts;
        0 when nothing was routed.

    Raises:
        ValueError: no experts, or a negative count.

    Source: Auxiliary-Loss-Free Load Balancing, arXiv 2408.15664, the metric MaxVio of its experiments.
    """
    _check(counts)
    total = sum(counts)
    return max(counts) * len(counts) / total - 1.0 if total else 0.0


def least_load(counts: Sequence[int]) -> float:
    """Share of the emptiest expert: min(counts) / mean(counts); 1 at balance, 0 if an expert starves.

    Raises:
        ValueError: no experts, or a negative count.
    """
    _check(counts)
    total = sum(counts)
    return min(counts) * len(counts) / total if total else 1.0


def _check(counts: Sequence[int]) -> None:
    if len(counts) == 0:
        raise ValueError("counts is empty; a layer has at least one expert")
    if min(counts) < 0:
        raise ValueError(f"counts={list(counts)} must not be negative")
