"""Ranks that make only their own groups agree on every group's name, and none waits for another for good.

Every rank has a ledger of its own here, and what it would ask torch for is written down.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_megatron.parallel.communicators import Ledger, communicator_options, ledger

Request = tuple[tuple[int, ...], str]


class World:
    """Stands for the group of all ranks."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks

    def size(self) -> int:
        return self.num_ranks


class Process:
    """A rank with its ledger; a group is here its name, which torch makes of its ranks and of the groups before."""

    def __init__(self, rank: int, num_ranks: int) -> None:
        self.made: list[tuple[tuple[int, ...], int]] = []
        self.world: Any = World(num_ranks)
        self.ledger = Ledger(rank, self.world, self.make)

    def make(self, ranks: Sequence[int], name: str | None = None) -> tuple[tuple[int, ...], int]:
        self.made.append((tuple(ranks), len(self.made)))
        return self.made[-1]


def go_through(num_ranks: int, requests: list[Request]) -> tuple[list[Process], list[list[Any]]]:
    """Every rank asks for every group; returns the processes and, by request, what each got."""
    processes = [Process(rank, num_ranks) for rank in range(num_ranks)]
    return processes, [[process.ledger.group(ranks, purpose) for process in processes] for ranks, purpose in requests]


def all_meet(processes: list[Process]) -> bool:
    """Whether everybody comes to the end, if making a group lasts until all of its ranks make it by the same name."""
    positions = [0] * len(processes)
    while True:
        at = [process.made[position] if position < len(process.made) else None
              for process, position in zip(processes, positions, strict=True)]
        ready = next((name for name in at if name is not None and all(at[rank] == name for rank in name[0])), None)
        if ready is None:
            return not any(at)
        for rank in ready[0]:
            positions[rank] += 1


@st.composite
def requests_of_a_run(draw: st.DrawFn) -> tuple[int, list[Request]]:
    """Any sets of ranks, some more than once, some for a purpose of their own."""
    num_ranks = draw(st.integers(1, 7))
    sets = st.lists(st.integers(0, num_ranks - 1), min_size=1, unique=True).map(tuple)
    return num_ranks, draw(st.lists(st.tuples(sets, st.sampled_from(["", "", "up", "down"])), max_size=15))


@given(requests_of_a_run())
@settings(max_examples=100, deadline=None)
def test_all_ranks_of_a_group_have_one_name_for_it(run: tuple[int, list[Request]]) -> None:
    num_ranks, requests = run
    processes, found = go_through(num_ranks, requests)
    for process in processes:
        process.ledger.level()
    assert len({len(process.made) for process in processes}) == 1, "torch counts the calls of each"
    for (ranks, purpose), groups in zip(requests, found, strict=True):
        assert {rank for rank, group in enumerate(groups) if group is not None} == set(ranks) or len(ranks) == num_ranks
        members = [groups[rank] for rank in ranks]
        if len(ranks) == num_ranks and not purpose:
            assert members == [processes[rank].world for rank in ranks], "the group of all ranks is there already"
        else:
            assert len(set(members)) == 1 and members[0][0] == tuple(sorted(ranks))
    by_key: dict[Any, Any] = {}
    for (ranks, purpose), groups in zip(requests, found, strict=True):
        assert by_key.setdefault((tuple(sorted(ranks)), purpose), groups) == groups, "one group for a set and purpose"
    assert all_meet(processes)
    assert all(rank in ranks for rank, process in enumerate(processes) for ranks, _ in process.made)


def test_who_is_behind_makes_groups_of_itself_alone() -> None:
    """As few as are needed: the first and last stages have a group that the middle ones lack."""
    requests: list[Request] = [((0, 1, 2, 3), "pipeline"), ((0, 3), ""), ((0, 1), "up"), ((2, 3), "up"), ((1, 2), "up")]
    processes, _ = go_through(4, requests)
    assert [[ranks for ranks, _ in process.made] for process in processes] == [
        [(0, 1, 2, 3), (0, 3), (0, 1)],
        [(0, 1, 2, 3), (1,), (0, 1), (1, 2)],
        [(0, 1, 2, 3), (2,), (2, 3), (1, 2)],
        [(0, 1, 2, 3), (0, 3), (2, 3)]]


def test_without_that_the_names_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard's own test: ranks that make only their groups, and count nothing, do not find each other."""
    def careless(self: Ledger, ranks: tuple[int, ...], purpose: str, make: Any) -> Any:
        return make(ranks, purpose) if self.rank in ranks else None

    monkeypatch.setattr(Ledger, "_new", careless)
    processes, found = go_through(3, [((0, 2), ""), ((0, 1), "")])
    assert found[1][0] != found[1][1] and not all_meet(processes)


def test_a_ledger_is_of_one_world() -> None:
    """A process that starts torch.distributed anew begins to count anew."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    found = []
    for _ in range(2):
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
        try:
            found.append(ledger())
            assert ledger() is found[-1] and ledger().group([0, 1]).size() == 2
            assert found[-1].num_made == [1, 1, 0, 0]
        finally:
            torch.distributed.destroy_process_group()
    assert found[0] is not found[1]


def test_nccl_makes_communicators_when_they_are_used() -> None:
    assert communicator_options("gloo") is None
    if torch.distributed.is_nccl_available():
        options = communicator_options("nccl")
        assert isinstance(options, torch.distributed.ProcessGroupNCCL.Options)
        assert getattr(options, "lazy_init", True), "torch before 2.15 has no such option, and does so by itself"
