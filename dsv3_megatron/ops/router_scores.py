"""What a router makes of its logits: affinities of tokens to experts. Nothing else computes them.

The functions are in `config/router_functions.py`, by their names; training's router, generation and the planner's
measurements call them here. A checkpoint for other programs is written only where they compute the same
(`checkpoint/hf/config_json.py` asks).

Shapes: T tokens, E experts.
"""

from __future__ import annotations

import torch

from dsv3_megatron.config.router_functions import SCORE_FUNCTIONS


def router_scores(logits_TE: torch.Tensor, score_function: str) -> torch.Tensor:
    """Affinities of tokens to experts.

    Args:
        logits_TE: fp32 or fp64, products of tokens and the experts' centroids.
        score_function: Name in SCORE_FUNCTIONS.

    Returns:
        scores_TE: In the logits' dtype, in 0..1.

    Raises:
        ValueError: There is no such function.
    """
    if score_function not in SCORE_FUNCTIONS:
        raise ValueError(f"moe_router_score_function={score_function!r} must be one of {', '.join(SCORE_FUNCTIONS)}")
    return SCORE_FUNCTIONS[score_function](logits_TE)
