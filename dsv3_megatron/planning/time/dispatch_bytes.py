"""Bytes that tokens and their experts' outputs are on the wire: how many destinations, and how large a row.

With experts on N nodes of L ranks each, d(P) the mean number of P equal parts of the experts that a token goes to
(`expected_destinations`), and tokens spread evenly, a token's row is sent

                 over the network          within nodes
    node         d(N) (1 - 1/N)            d(N L) (1 - 1/L)
    alltoall     K (1 - 1/N)               K (1/N - 1/(N L))

times: a part of 1/N of what is sent stays on the node, and of what is passed on there 1/L is where it came to. At
V3's routing and EP64 on 8 nodes, d(8) = 3.97 of at most 4, d(64) = 7.48 and K = 8. The router keeps the groups with the
best experts: so a token goes to nearly all that it may go to (were the groups chosen by lot, d(8) would be 3.63).

Source: DeepSeek-V3 report, section 3.2.2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

import numpy as np

from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.ops.row_bytes import GATE_BYTES, gated_bytes

# Bytes of an expert's id, int16.
ID_BYTES = 2
# Affinities that are drawn: for 256 experts, of so many tokens that a mean number of destinations is right to 1 in 500.
_DRAWN_NUMBERS = 1 << 21


class Carried(Enum):
    """What travels with rows besides their values.

    Attributes:
        NOTHING: Rows alone.
        ROUTING: Gates and, once for each node, which experts they are of.
        GATES: Gradients of the gates.
    """

    NOTHING = "nothing"
    ROUTING = "routing"
    GATES = "gates"


@dataclass(frozen=True)
class Destinations:
    """Mean numbers of other ranks that a token's row is sent to.

    Attributes:
        network: Ranks on other nodes.
        node: Ranks of the node it is sent from, or has come to.
    """

    network: float
    node: float


def bytes_of_row(dispatcher: str, row_bytes: int, carried: Carried, top_k: int) -> int:
    """Bytes that a row takes with what travels with it, for all experts of its token or for the one that it goes to.

    Args:
        dispatcher: "node" (and "flex", taken to be the same) or "alltoall".
        row_bytes: Bytes of the row's values.
        carried: What travels with the row.
        top_k: Experts of a token.
    """
    if carried is Carried.NOTHING:
        return row_bytes
    if dispatcher == "alltoall":
        return gated_bytes(row_bytes)
    return gated_bytes(row_bytes, top_k * (GATE_BYTES + (ID_BYTES if carried is Carried.ROUTING else 0)))


def rows_of_a_token(model: ModelConfig, dispatcher: str, ranks: int) -> float:
    """Rows that are made of a token on average: one for each rank with an expert of it, or for each expert."""
    return float(model.moe_router_topk) if dispatcher == "alltoall" else expected_destinations(model, ranks)


def destinations(model: ModelConfig, dispatcher: str, num_nodes: int, size: int) -> Destinations:
    """Expected destinations of a token, where no expert is preferred.

    Args:
        model: The model, which says how experts are chosen.
        dispatcher: "node" (and "flex", taken to be the same) or "alltoall".
        num_nodes: Nodes that the experts' ranks lie on.
        size: Ranks on each of them.
    """
    ranks = num_nodes * size
    rows = rows_of_a_token(model, dispatcher, ranks)
    if dispatcher == "alltoall":
        return Destinations(rows * (1 - 1 / num_nodes), rows * (1 / num_nodes - 1 / ranks))
    return Destinations(rows_of_a_token(model, dispatcher, num_nodes) * (1 - 1 / num_nodes), rows * (1 - 1 / size))


def bytes_of_straddling_groups(model: ModelConfig, num_nodes: int, row_bytes: float) -> float:
    """Bytes of a token that cross the network because the router's groups are not those of nodes.

    A token goes to `moe_router_group_topk` groups, so to no more nodes where a node holds whole groups. Counted is what
    it goes to on average beyond the nodes of as many as there are groups; 0 without groups, or where they match.

    Args:
        model: The model.
        num_nodes: Nodes that the experts' ranks lie on.
        row_bytes: Bytes of a row, there and back.
    """
    groups = model.moe_router_num_groups
    if groups <= 1 or num_nodes <= 1 or groups % num_nodes == 0:
        return 0.0
    split, whole = (expected_destinations(model, parts) * (1 - 1 / parts) for parts in (num_nodes, groups))
    return max(0.0, split - whole) * row_bytes


@lru_cache(maxsize=1024)
def expected_destinations(model: ModelConfig, num_parts: int) -> float:
    """Number of the `num_parts` equal parts of the experts that a token goes to on average, its own part among them.

    Affinities are even and independent: no expert is preferred. Parts are nodes, or ranks.

    Source: DeepSeek-V3 report, section 2.1.2: a token goes to the `moe_router_group_topk` groups with the best sums of
    their best experts, and in them to its best experts.
    """
    experts, groups, kept, top = (model.num_experts, model.moe_router_num_groups, model.moe_router_group_topk,
                                  model.moe_router_topk)
    if num_parts <= 1:
        return 1.0
    if groups <= 1 or kept == groups:  # every choice is equally likely: of a part's experts none is drawn, or one is
        part = experts // num_parts
        return num_parts * (1 - _none(part, experts, top))
    part_TK = np.sort(_drawn_choices(experts, groups, kept, top) * num_parts // experts, axis=1)
    return 1.0 + float(np.mean(np.count_nonzero(np.diff(part_TK, axis=1), axis=1)))


@lru_cache(maxsize=16)
def _drawn_choices(experts: int, groups: int, kept: int, top: int) -> np.ndarray:
    """ids_TK: experts of tokens whose affinities are sigmoids of independent normal numbers, always the same ones."""
    tokens = max(256, _DRAWN_NUMBERS // experts)
    score_TE = 1 / (1 + np.exp(-np.random.default_rng(0).standard_normal((tokens, experts))))
    score_TGS = score_TE.reshape(tokens, groups, experts // groups)
    best_TG = np.sort(score_TGS, axis=2)[:, :, -max(1, top // kept):].sum(axis=2)
    kept_TG = np.argsort(-best_TG, axis=1)[:, :kept]
    is_kept_TG = np.zeros((tokens, groups), dtype=bool)
    np.put_along_axis(is_kept_TG, kept_TG, True, axis=1)
    score_TGS[~is_kept_TG] = -1.0
    return np.argpartition(-score_TGS.reshape(tokens, experts), top - 1, axis=1)[:, :top]


def _none(marked: int, total: int, draws: int) -> float:
    """Probability that none of `draws` without replacement is among the marked."""
    return math.comb(total - marked, draws) / math.comb(total, draws) if total - marked >= draws else 0.0
