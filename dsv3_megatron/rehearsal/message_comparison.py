"""Whether ranks that share a group post the same messages on it, in the same order.

A collective that one rank posts and another does not, or with another size or dtype, hangs on NCCL or mixes up memory,
and no rank can see it alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, zip_longest

from dsv3_megatron.rehearsal.collective_calls import RankCall

_POINT_TO_POINT = ("send", "receive")


@dataclass(frozen=True)
class Mismatch:
    """The first message of a group that two of its ranks do not agree about.

    Attributes:
        ranks: The two ranks.
        group: Ranks of the group, in words.
        place: Which message of these two ranks on the group it is, from 1.
        first: What the first rank posts there; None: nothing more.
        second: What the second rank posts there; None: nothing more.
        why: What differs.
    """

    ranks: tuple[int, int]
    group: str
    place: int
    first: RankCall | None
    second: RankCall | None
    why: str

    def describe(self) -> str:
        """The mismatch in words, with both lines."""
        def said(rank: int, call: RankCall | None) -> str:
            return f"rank {rank}: " + ("nothing more" if call is None else f"{call.describe()} at {call.line}")

        return (f"message {self.place} of {self.group}: {self.why}\n      {said(self.ranks[0], self.first)}\n"
                f"      {said(self.ranks[1], self.second)}")


def name_group(group: tuple[tuple[int, ...], int]) -> str:
    """A group in words."""
    ranks, number = group
    listed = ", ".join(map(str, ranks)) if len(ranks) <= 4 else f"{ranks[0]}, {ranks[1]}, ... {ranks[-1]}"
    which = f", number {number + 1} of these" if number else ""
    return f"the group of {len(ranks)} ranks ({listed}{which})"


def compare_calls(calls: Mapping[int, Sequence[RankCall]]) -> list[Mismatch]:
    """Compare the messages of every two rehearsed ranks on every group that both are in.

    Args:
        calls: Messages of each rehearsed rank, by global rank.

    Returns:
        The first mismatch of each two ranks on each group; empty: none.
    """
    groups: dict[tuple[tuple[int, ...], int], dict[int, list[RankCall]]] = {}
    for rank, posted in calls.items():
        for call in posted:
            groups.setdefault(call.group, {}).setdefault(rank, []).append(call)
    found: list[Mismatch] = []
    for group, by_rank in groups.items():
        members = [rank for rank in group[0] if rank in calls]
        # The first with every other one; point to point, every two.
        for other in members[1:]:
            found += _compare(group, members[0], other, by_rank, _is_collective, _differ)
        for one, other in combinations(members, 2):
            found += _compare(group, one, other, by_rank, _sent(one, other), _differ_on_the_way)
            found += _compare(group, one, other, by_rank, _sent(other, one), _differ_on_the_way)
    return found


def _is_collective(rank: int, call: RankCall) -> bool:
    return call.operation not in _POINT_TO_POINT


def _sent(source: int, destination: int) -> Callable[[int, RankCall], bool]:
    """Messages from one rank to the other: what the one sends and the other receives."""
    def is_one(rank: int, call: RankCall) -> bool:
        wanted = ("send", destination) if rank == source else ("receive", source)
        return (call.operation, call.peer) == wanted

    return is_one


def _compare(group: tuple[tuple[int, ...], int], one: int, other: int, by_rank: Mapping[int, Sequence[RankCall]],
             is_wanted: Callable[[int, RankCall], bool], differ: Callable[..., str | None]) -> list[Mismatch]:
    posted = [[call for call in by_rank.get(rank, ()) if is_wanted(rank, call)] for rank in (one, other)]
    for place, (first, second) in enumerate(zip_longest(*posted), 1):
        why = "one of them posts fewer" if first is None or second is None else differ(group[0], one, other, first,
                                                                                      second)
        if why is not None:
            return [Mismatch((one, other), name_group(group), place, first, second, why)]
    return []


def _differ(ranks: tuple[int, ...], one: int, other: int, first: RankCall, second: RankCall) -> str | None:
    if first.operation != second.operation:
        return "other operations"
    if first.dtype != second.dtype:
        return "other dtypes"
    if first.operation == "all_to_all":
        places = ranks.index(one), ranks.index(other)
        there = first.sizes[0][places[1]], second.sizes[1][places[0]]
        back = second.sizes[0][places[0]], first.sizes[1][places[1]]
        if there[0] != there[1] or back[0] != back[1]:
            return (f"rank {one} sends {there[0]} and rank {other} receives {there[1]} elements; back {back[0]} and "
                    f"{back[1]}")
        return None
    if first.sizes != second.sizes:
        return "other sizes"
    return "other roots" if first.peer != second.peer else None


def _differ_on_the_way(ranks: tuple[int, ...], one: int, other: int, first: RankCall, second: RankCall) -> str | None:
    if first.dtype != second.dtype:
        return "other dtypes"
    return "other sizes" if first.sizes != second.sizes else None
