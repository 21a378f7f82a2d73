"""What a router makes of its logits: affinities of tokens to experts. Nothing else computes them.

Training's router, generation and the planner's measurements take the function by its name, `moe_router_score_function`
of the model. A checkpoint for other programs is written only where they compute the same
(`checkpoint/hf/config_json.py` asks these functions). Another function is one more entry here and its name in
`config/model.py`; a sum over experts of 1 is not needed, but values in 0..1 are: the choice's bias, the gates
(affinities of the chosen experts divided by their sum) and the histograms of affinities count on it.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

# Differentiable, elementwise over tokens; a function keeps its result for backward and nothing else of this size, which
# is what the memory estimate has.
SCORE_FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    # DeepSeek-V3 report, eq. 15.
    "sigmoid": torch.sigmoid,
    # DeepSeek-V2 report, eq. 22: over all experts, before any are chosen.
    "softmax": partial(torch.softmax, dim=-1),
}


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
