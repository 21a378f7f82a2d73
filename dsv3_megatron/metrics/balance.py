"""How evenly the tokens of a step are spread over a layer's experts.

Usage:
    max_violation([30, 10, 20, 20])     # 0.5: the fullest expert got 1.5 times its share
"""

from __future__ import annotations

import math
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


def normalised_entropy(counts: Sequence[int]) -> float:
    """Entropy of the load over its largest possible value, log(num_experts): 1 at balance, 0 for a single expert.

    Raises:
        ValueError: no experts, or a negative count.
    """
    _check(counts)
    total = sum(counts)
    if not total or len(counts) == 1:
        return 1.0
    return -sum(count / total * math.log(count / total) for count in counts if count) / math.log(len(counts))


def dead_share(counts: Sequence[int]) -> float:
    """Share of the experts that got no token at all; 0 when nothing was routed.

    Raises:
        ValueError: no experts, or a negative count.
    """
    _check(counts)
    return sum(count == 0 for count in counts) / len(counts) if any(counts) else 0.0


def bias_direction(counts: Sequence[int]) -> float:
    """Share of the experts whose balancing bias a step raises, minus the share whose bias it lowers.

    Near 0 the load is spread symmetrically. Near 1 a few experts are overloaded and all others below the mean.

    Raises:
        ValueError: no experts, or a negative count.

    Source: the sign of `optim/router_bias.py`, which raises the bias of an expert below the mean load.
    """
    _check(counts)
    total, experts = sum(counts), len(counts)
    return sum((total > experts * count) - (total < experts * count) for count in counts) / experts


def _check(counts: Sequence[int]) -> None:
    if len(counts) == 0:
        raise ValueError("counts is empty; a layer has at least one expert")
    if min(counts) < 0:
        raise ValueError(f"counts={list(counts)} must not be negative")
