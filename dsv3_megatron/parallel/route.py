"""The ways of one micro-batch's tokens to their experts' ranks and home: who sends how many rows to whom.

Every rank's counts, gathered once, give all numbers of rows. Tokens may go in several legs, one after the other: while
those of one leg go on within their nodes, those of the next one are on the network.

Shapes: T tokens, E experts, K top-k, R rows, p parts of the experts (nodes or ranks).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dsv3_megatron.ops.routes import parts_of_rows, parts_of_tokens, rows_of_parts
from dsv3_megatron.parallel.exchange import Splits
from dsv3_megatron.parallel.expert_nodes import ExpertNodes


@dataclass
class Leg:
    """Some of a rank's tokens, which travel together.

    Attributes:
        tokens: Place of the tokens among all of the rank.
        hops: Numbers of rows of each transfer on the way out.
        token_of_row: int64, the token, counted within the leg, of each row that leaves this rank.
        row_of_relayed: int64, of the rows that this rank sends on within the node, which of those that came; None
            before they have come.
    """

    tokens: slice
    hops: tuple[Splits, ...]
    token_of_row: torch.Tensor
    row_of_relayed: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of the leg on this rank."""
        return self.tokens.stop - self.tokens.start

    @property
    def num_passing(self) -> int:
        """Rows that come to this rank over the network, to be sent on."""
        return sum(self.hops[0].received)

    @property
    def num_rows(self) -> int:
        """Rows that come to this rank for its experts."""
        return sum(self.hops[-1].received)

    @property
    def homeward(self) -> tuple[Splits, ...]:
        """Numbers of rows of each transfer on the way home."""
        return tuple(hop.reversed() for hop in reversed(self.hops))


class Route:
    """The ways of one micro-batch's tokens in one layer; every rank of the experts makes one at the same time.

    Args:
        routing_map_TE: bool, the chosen experts of this rank's tokens.
        nodes: Nodes that the experts' ranks are on.
        counted_group: Ranks whose counts are gathered: the experts', with the ranks that each expert is split over
            next to each other.
        num_legs: Legs that tokens go in where they go over two groups.

    Attributes:
        legs: Legs, known after `settle`.
        rows_of_splits: Rows that came to each of the ranks that the experts here are split over.
        rows_of_experts: Rows of each expert here, of all those ranks.
    """

    def __init__(self, routing_map_TE: torch.Tensor, nodes: ExpertNodes,
                 counted_group: torch.distributed.ProcessGroup, num_legs: int = 1) -> None:
        self.nodes, self.num_tokens, self.num_experts = nodes, *routing_map_TE.shape
        self.num_ranks = nodes.num_nodes * nodes.size
        self._is_for_Tp = parts_of_tokens(routing_map_TE, nodes.num_nodes if len(nodes.hops) == 2 else self.num_ranks)
        wanted = (self._is_for_Tp, parts_of_tokens(routing_map_TE, self.num_ranks), routing_map_TE)
        self._lengths = [what.shape[1] for what in wanted]
        self._bounds = _bounds(self.num_tokens, num_legs if len(nodes.hops) == 2 else 1)
        leg_counts = torch.stack([torch.cat([what[leg].sum(0) for what in wanted]) for leg in self._bounds])
        self._num_splits = counted_group.size() // self.num_ranks
        self._own_split = counted_group.rank() % self._num_splits
        self._gathered = leg_counts.new_empty((counted_group.size(), *leg_counts.shape))
        work = torch.distributed.all_gather_into_tensor(self._gathered.view(-1), leg_counts.view(-1),
                                                        group=counted_group, async_op=True)
        assert work is not None, "this process is in the group"
        self._work = work
        self.legs: tuple[Leg, ...] = ()
        self.rows_of_splits: tuple[int, ...] = ()
        self.rows_of_experts: tuple[int, ...] = ()

    def settle(self) -> None:
        """Let the host know all numbers of rows: it waits here, once."""
        if self.legs:
            return
        nodes = self.nodes
        self._work.wait()
        # [ranks, splits of an expert, legs, counts]
        counts = self._gathered.cpu().view(self.num_ranks, self._num_splits, len(self._bounds), -1)
        first, to_ranks, to_experts = counts.split(self._lengths, dim=-1)
        self.legs = tuple(
            self._leg(tokens, first[:, self._own_split, leg], to_ranks[:, self._own_split, leg])
            for leg, tokens in enumerate(self._bounds))
        self.rows_of_splits = tuple(to_ranks[..., nodes.rank].sum((0, 2)).tolist())
        num_local = self.num_experts // self.num_ranks
        self.rows_of_experts = tuple(
            to_experts[..., nodes.rank * num_local:(nodes.rank + 1) * num_local].sum((0, 1, 2)).tolist())
        del self._gathered, self._is_for_Tp

    def _leg(self, tokens: slice, first: torch.Tensor, to_ranks: torch.Tensor) -> Leg:
        hops = tuple(Splits.of(sent.tolist(), received.tolist(), group) for (sent, received), group in zip(
            _numbers(self.nodes, first, to_ranks), self.nodes.hops, strict=True))
        return Leg(tokens, hops, rows_of_parts(self._is_for_Tp[tokens], sum(hops[0].sent)))

    def relay(self, leg: Leg, ids_RK: torch.Tensor) -> None:
        """Note which of the rows that came to this rank go on to which rank of its node."""
        nodes, num_local = self.nodes, self.num_experts // self.num_ranks
        is_for_Rp = parts_of_rows(ids_RK, nodes.node * nodes.size * num_local, num_local, nodes.size)
        leg.row_of_relayed = rows_of_parts(is_for_Rp, sum(leg.hops[1].sent))

    @property
    def num_rows(self) -> int:
        """Rows that come to this rank for its experts, of all legs."""
        return sum(leg.num_rows for leg in self.legs)


def _bounds(num_tokens: int, num_legs: int) -> list[slice]:
    ends = [num_tokens * leg // num_legs for leg in range(num_legs + 1)]
    return [slice(start, end) for start, end in zip(ends[:-1], ends[1:], strict=True)]


def _numbers(nodes: ExpertNodes, first: torch.Tensor, to_ranks: torch.Tensor) -> list[tuple[Any, Any]]:
    """Rows sent and received of each transfer, of every rank's counts [ranks, parts] and [ranks, ranks]."""
    if len(nodes.hops) == 1:
        return [(to_ranks[nodes.rank], to_ranks[:, nodes.rank])]
    here = nodes.node * nodes.size
    across = (first[nodes.rank], first[nodes.place::nodes.size, nodes.node])
    # A rank sends on what came from the ranks with its place.
    by_place = to_ranks.reshape(nodes.num_nodes, nodes.size, -1).sum(0)
    return [across, (by_place[nodes.place, here:here + nodes.size], by_place[:, nodes.rank])]
