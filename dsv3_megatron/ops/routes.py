"""Which rows go where, from tokens' experts: on the tensors' device, without the host reading any of it.

The host knows how many there will be (it has the counts of all ranks), so that no size has to be waited for.

Shapes: T tokens, R rows, E experts, K top-k, p parts of the experts (nodes or ranks).
"""

from __future__ import annotations

import torch


def chosen_experts(routing_map_TE: torch.Tensor, top_k: int) -> torch.Tensor:
    """List each token's experts, in ascending order.

    Args:
        routing_map_TE: bool, the chosen experts, `top_k` of each token.
        top_k: Experts of a token.

    Returns:
        int64 [T, K].
    """
    tokens, experts = routing_map_TE.shape
    place_TE = (routing_map_TE.cumsum(1) - 1).masked_fill_(~routing_map_TE, top_k)
    ids_TE = torch.arange(experts, device=routing_map_TE.device).expand(tokens, experts)
    # Experts that are not chosen share a column behind the others.
    return place_TE.new_zeros(tokens, top_k + 1).scatter_(1, place_TE, ids_TE)[:, :top_k]


def parts_of_tokens(routing_map_TE: torch.Tensor, num_parts: int) -> torch.Tensor:
    """Say which of the equal parts of the experts, nodes or ranks, a token has an expert in: bool [T, num_parts]."""
    tokens, experts = routing_map_TE.shape
    return routing_map_TE.view(tokens, num_parts, experts // num_parts).any(-1)


def rows_of_parts(is_in_Rp: torch.Tensor, count: int) -> torch.Tensor:
    """List the rows that go to each part, by part and then in their order.

    Args:
        is_in_Rp: bool, whether a row goes to a part.
        count: Number of those that do.

    Returns:
        int64 [count], rows.
    """
    places = torch.nonzero_static(is_in_Rp.t().reshape(-1), size=count).squeeze(1)
    return places % max(1, is_in_Rp.shape[0])


def parts_of_rows(ids_RK: torch.Tensor, first: int, part_size: int, num_parts: int) -> torch.Tensor:
    """Say which parts of the experts from `first` on the rows have an expert in: bool [R, num_parts]."""
    part_RK = torch.div(ids_RK.long() - first, part_size, rounding_mode="floor")
    part_RK = part_RK.masked_fill((part_RK < 0) | (part_RK >= num_parts), num_parts)
    is_in = torch.zeros(len(ids_RK), num_parts + 1, dtype=torch.bool, device=ids_RK.device)
    return is_in.scatter_(1, part_RK, True)[:, :num_parts]


def slots_of_experts(ids_RK: torch.Tensor, first: int, num_experts: int, count: int) -> torch.Tensor:
    """List the places [R, K] of this rank's experts, by expert and then by row.

    Args:
        ids_RK: Global ids of the experts of a row's token.
        first: Id of the first expert here.
        num_experts: Experts here.
        count: Number of places that name one of them.

    Returns:
        int64 [count], places in the flattened [R, K].
    """
    local = (ids_RK.int() - first).flatten()
    order = local.masked_fill((local < 0) | (local >= num_experts), num_experts).argsort(stable=True)
    return order[:count]
