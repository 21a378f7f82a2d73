"""Which experts a rehearsal's tokens go to: evenly, or more to the experts of the first expert-parallel rank.

Every rank is taken to route alike. Only numbers of rows follow from it: what a rank sends and receives, and how much
its experts compute.
"""

from __future__ import annotations

import torch

from dsv3_megatron.config.fields import ConfigError


def require_imbalance(imbalance: float, *, experts: int, top_k: int, ep: int) -> None:
    """Check that a rank's experts can get so many rows.

    Raises:
        ConfigError: below 1, or more than if every token went to as many of its experts as it can.
    """
    own = experts // ep
    most = ep * min(top_k, own) / top_k
    if not 1 <= imbalance <= most:
        raise ConfigError(f"--imbalance={imbalance:g} must be at least 1, which is balance, and at most {most:g}: "
                          f"then every token goes to {min(top_k, own)} of the first rank's {own} experts")


def imbalance_of(expert_rank: int, imbalance: float, *, ep: int) -> float:
    """Rows of a rank's experts over the mean: the first rank's are given, the others share the rest."""
    return imbalance if expert_rank == 0 or ep == 1 else (ep - imbalance) / (ep - 1)


def made_routing(tokens: int, *, experts: int, top_k: int, ep: int, imbalance: float) -> torch.Tensor:
    """Experts of each token.

    Args:
        tokens: Number of tokens T.
        experts: Number of experts E.
        top_k: Experts per token K.
        ep: Expert-parallel ranks.
        imbalance: Rows that go to the first rank's experts, over the mean of the ranks.

    Returns:
        int64 [T, K], different in each row.
    """
    wanted = round(imbalance * tokens * top_k / ep) if ep > 1 else 0
    own, others = experts // ep, experts - experts // ep
    if ep == 1 or imbalance == 1:
        start_T = torch.arange(tokens) * top_k
        return (start_T[:, None] + torch.arange(top_k)) % experts
    # Of each token, so many go to the first rank: as even as can be.
    number_T = (torch.arange(1, tokens + 1) * wanted) // tokens - (torch.arange(tokens) * wanted) // tokens
    place_K = torch.arange(top_k)
    before_T = number_T.cumsum(0) - number_T
    first_TK = (before_T[:, None] + place_K) % own
    rest_T = (top_k - number_T).cumsum(0) - (top_k - number_T)
    rest_TK = own + (rest_T[:, None] + place_K - number_T[:, None]) % max(others, 1)
    return torch.where(place_K < number_T[:, None], first_TK, rest_TK)
