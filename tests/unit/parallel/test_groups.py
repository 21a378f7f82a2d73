"""Groups of a run, as each kind of rank makes them, on torch's backend that sends nothing; among them of 2048 ranks."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch

from dsv3_megatron.config.guards import UNWATCHED_TIMEOUT_S, GuardConfig
from dsv3_megatron.config.parallel import ParallelConfig
from dsv3_megatron.config.presets import preset
from dsv3_megatron.platform import Device, cpu, prepare

TINY = preset("tiny").model
WORLD_SIZE, RANKS_PER_NODE = 2048, 8
# The report's: 16 pipeline ranks, experts over 64 ranks; 128 pipelines beside each other.
REPORT: dict[str, Any] = {"pipeline_model_parallel_size": 16, "expert_model_parallel_size": 64}
NUM_CALLS_BEFORE = 13_957  # of torch's new_group, at each rank, when every rank made every group that Megatron-Core has


@pytest.fixture(scope="module", autouse=True)
def megatron_core() -> Iterator[None]:
    """Megatron-Core, importable without CUDA."""
    was_installed = cpu.installed()
    prepare()
    yield
    if not was_installed:
        cpu.remove_stand_ins()


@dataclass
class Made:
    """What a rank has made of a run's groups.

    Attributes:
        asked_of_torch: Ranks of each group that torch's new_group was called for.
        timeouts_s: How long a message of each of these waits for its peer.
        asked_by_megatron: Ranks of each group that Megatron-Core asked for.
        groups: Megatron-Core's collection.
        finishing: Those with which gradients are finished.
        nodes: Where the experts' ranks are, if tokens travel by nodes.
    """

    asked_of_torch: list[tuple[int, ...]] = field(default_factory=list)
    timeouts_s: list[float] = field(default_factory=list)
    asked_by_megatron: list[tuple[int, ...]] = field(default_factory=list)
    groups: Any = None
    finishing: Any = None
    nodes: Any = None

    @property
    def num_communicators(self) -> int:
        """Communicators that the rank holds when all are in use; that of all ranks is there without a call."""
        return 1 + sum(len(ranks) > 1 for ranks in self.asked_of_torch)


@contextlib.contextmanager
def rank_of(world_size: int, rank: int, parallel: ParallelConfig) -> Iterator[Made]:
    """One rank that makes its groups and the edges of its pipeline; the other ranks do not exist."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from dsv3_megatron.parallel.expert_nodes import expert_nodes
    from dsv3_megatron.parallel.groups import create_groups, destroy_groups, groups_of_gradients, pipelines
    from dsv3_megatron.parallel.placement import placement
    from dsv3_megatron.schedule.transfers import edges_of
    from dsv3_megatron.schedule.transport import PipelineChannels

    made = Made()
    new_group = torch.distributed.new_group

    def count(ranks: Any, *args: Any, **kwargs: Any) -> Any:
        made.asked_of_torch.append(tuple(ranks))
        made.timeouts_s.append(kwargs["timeout"].total_seconds())
        return new_group(ranks, *args, **kwargs)

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        from dsv3_megatron.parallel.communicators import Ledger

        group = Ledger.group

        def ask(self: Ledger, ranks: Any, purpose: str = "", make: Any = None) -> Any:
            if make is not None:
                made.asked_by_megatron.append(tuple(ranks))
            return group(self, ranks, purpose, make)

        with mock.patch.object(torch.distributed, "new_group", count), mock.patch.object(Ledger, "group", ask):
            made.groups = create_groups(parallel, seed=1)
            if parallel.token_dispatcher(RANKS_PER_NODE) == "node":
                made.nodes = expert_nodes(parallel, made.groups, parallel.ranks_per_node or RANKS_PER_NODE)
            made.finishing = groups_of_gradients(TINY, parallel, made.groups)
            if parallel.pipeline_model_parallel_size > 1:
                PipelineChannels(pipelines(made.groups), edges_of(placement(parallel)), device=torch.device("cpu"))
        yield made
    finally:
        destroy_groups()


def ranks_of(group: Any) -> list[int]:
    return torch.distributed.get_process_group_ranks(group)


@pytest.mark.parametrize(("schedule", "rank"), [("1f1b", 0), ("1f1b", 300), ("1f1b", 2047), ("dualpipe", 300),
                                                ("dualpipev", 300)])
def test_calls_and_communicators_of_2048_ranks(schedule: str, rank: int) -> None:
    """Some ten instead of thousands: on a GPU each call of a rank may be a collective of all."""
    with rank_of(WORLD_SIZE, rank, ParallelConfig(**REPORT, pipeline_schedule=schedule)) as made:
        assert len(made.asked_by_megatron) == NUM_CALLS_BEFORE
        assert all(rank in ranks for ranks in made.asked_of_torch), "only the groups that it is in"
        assert len(made.asked_of_torch) <= 15 and made.num_communicators <= 14
        alone = [ranks for ranks in made.asked_of_torch if len(ranks) == 1]
        assert len(alone) <= 4, "one for itself, and where others have more groups some to count as many"
        # Twice: a pair of neighbours has an edge for each way. Nothing else.
        assert all(number == 1 or len(ranks) == 2 for ranks, number in Counter(made.asked_of_torch).items()
                   if len(ranks) > 1)
        before = Counter(len(ranks) > 1 for ranks in made.asked_by_megatron if rank in ranks)
        print(f"{schedule}, rank {rank}: {len(made.asked_of_torch)} calls, {made.num_communicators} communicators; "
              f"before {NUM_CALLS_BEFORE} calls, {1 + before[True]} communicators and {before[False]} of one rank")


def test_a_rank_is_in_the_groups_of_its_layout() -> None:
    """By hand, for rank 300: position 2 of its pipeline, place 44 of the 128 beside each other."""
    with rank_of(WORLD_SIZE, 300, ParallelConfig(**REPORT)) as made:
        groups = made.groups
        assert ranks_of(groups.pp) == list(range(44, 2048, 128))
        assert ranks_of(groups.dp) == ranks_of(groups.dp_cp) == list(range(256, 384))
        assert ranks_of(groups.ep) == list(range(256, 320))
        assert ranks_of(groups.expt_dp) == [300, 364]
        assert ranks_of(groups.tp) == ranks_of(groups.expt_tp) == ranks_of(groups.cp) == [300]
        assert ranks_of(made.finishing.embd) == [300]
        assert groups.mp is groups.pp, "one group for a set of ranks"
        across, within = made.nodes.hops
        assert (made.nodes.num_nodes, made.nodes.size, made.nodes.node, made.nodes.place) == (8, 8, 5, 4)
        assert ranks_of(across) == list(range(260, 320, 8)) and ranks_of(within) == list(range(296, 304))
    with rank_of(WORLD_SIZE, 44, ParallelConfig(**REPORT)) as made:
        assert ranks_of(made.finishing.embd) == [44, 15 * 128 + 44]
    with rank_of(WORLD_SIZE, 300, ParallelConfig(**REPORT, pipeline_schedule="dualpipe")) as made:
        mirrored = 13 * 128
        assert ranks_of(made.groups.dp_cp) == [*range(256, 384), *range(mirrored, mirrored + 128)]
        assert ranks_of(made.groups.expt_dp) == [300, 364, mirrored + 44, mirrored + 108]
        assert ranks_of(made.groups.dp) == list(range(256, 384))
        assert ranks_of(made.finishing.embd) == [300]


@pytest.mark.parametrize("degrees", [
    {}, {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 4}, {"expert_model_parallel_size": 8},
    {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2},
    {"expert_model_parallel_size": 8, "ranks_per_node": 4}, {"expert_model_parallel_size": 4, "ranks_per_node": 2},
    {"expert_model_parallel_size": 4, "expert_tensor_parallel_size": 2, "ranks_per_node": 4},
    {"pipeline_model_parallel_size": 4, "expert_model_parallel_size": 2, "pipeline_schedule": "dualpipe"},
    {"pipeline_model_parallel_size": 2, "expert_tensor_parallel_size": 2, "pipeline_schedule": "dualpipev"},
    {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1, "pipeline_model_parallel_size": 2,
     "pipeline_schedule": "interleaved"}], ids=lambda degrees: "-".join(map(str, degrees.values())))
def test_all_ranks_ask_torch_for_the_same_groups(degrees: dict[str, Any]) -> None:
    """Each of a group's ranks, after as many calls of its own: torch makes a name of both."""
    asked: list[dict[tuple[tuple[int, ...], int], int]] = []
    for rank in range(8):
        with rank_of(8, rank, ParallelConfig(**degrees)) as made:
            asked.append({(ranks, number): rank for number, ranks in enumerate(made.asked_of_torch)})
    assert len({len(names) for names in asked}) == 1, "as many, for groups that others make by torch's own rules"
    for names in asked:
        for ranks, number in names:
            assert all((ranks, number) in asked[other] for other in ranks), (ranks, number)


# -- copies of the embedding ---------------------------------------------------------------------------


@pytest.mark.parametrize(("schedule", "ranks", "virtual", "layout", "copies"), [
    ("1f1b", 4, 1, None, ((0, 3), (1,), (2,), (0, 3))),
    ("1f1b", 4, 1, "Ett|t|t|mL", ((0, 3), (1,), (2,), (0, 3))),
    ("1f1b", 4, 1, "Ett|tt|m|L", ((0, 2), (1,), (0, 2), (3,))),
    ("1f1b", 3, 1, "Ett|ttm|L", ((0, 1), (0, 1), (2,))),
    ("zb1p", 2, 1, "Ettttm|L", ((0,), (1,))),
    # Both stages are on rank 0.
    ("interleaved", 2, 2, "Ett|tt|m|L", ((0,), (1,))),
    ("interleaved", 2, 2, "Ett|t|t|mL", ((0, 1), (0, 1))),
    # Folded: the last stage is on rank 0, the one before it on rank 1.
    ("zbv", 2, 1, "Et|tt|t|mL", ((0,), (1,))),
    ("dualpipev", 2, 1, "Ett|tt|m|L", ((0, 1), (0, 1))),
    # Mirrored ranks are summed before: ranks 0 and 3 with each other, 1 and 2 with each other.
    ("dualpipe", 4, 1, "Ett|t|t|mL", ((0,), (1,), (2,), (3,))),
    ("dualpipe", 4, 1, "Ett|tt|m|L", ((0, 1), (0, 1), (2, 3), (2, 3))),
    ("dualpipe", 2, 1, "Ettttm|L", ((0,), (1,))),
])
def test_ranks_with_copies_of_the_embedding(schedule: str, ranks: int, virtual: int,
                                            layout: str | None, copies: tuple[tuple[int, ...], ...]) -> None:
    from dsv3_megatron.parallel.groups import embedding_copies

    parallel = ParallelConfig(
        pipeline_model_parallel_size=ranks, num_virtual_stages_per_pipeline_rank=virtual, pipeline_schedule=schedule,
        pipeline_model_parallel_layout=layout)
    assert embedding_copies(TINY, parallel) == copies


def test_without_mtp_modules_nobody_has_a_copy() -> None:
    from dsv3_megatron.parallel.groups import embedding_copies

    model = preset("tiny").override(mtp_num_layers=0).model
    for schedule in ("1f1b", "dualpipe", "dualpipev"):
        parallel = ParallelConfig(pipeline_model_parallel_size=2, pipeline_schedule=schedule)
        assert embedding_copies(model, parallel) == ((0,), (1,))


def test_messages_of_all_groups_wait_until_the_watchdog_has_reported() -> None:
    from dsv3_megatron.parallel.communicators import set_collective_timeout

    limit_s = GuardConfig().collective_timeout_s
    set_collective_timeout(limit_s)
    try:
        with rank_of(8, 5, ParallelConfig(pipeline_model_parallel_size=2, expert_model_parallel_size=2)) as made:
            assert len(made.timeouts_s) > 3 and set(made.timeouts_s) == {limit_s}
    finally:
        set_collective_timeout(UNWATCHED_TIMEOUT_S)


def test_the_world_waits_as_long_as_it_is_told() -> None:
    from dsv3_megatron.parallel.communicators import collective_timeout, set_collective_timeout
    from dsv3_megatron.parallel.groups import start_process_group

    device, asked = Device(torch.device("cpu"), "gloo", "a processor"), []
    with mock.patch.object(torch.distributed, "is_initialized", return_value=False), \
            mock.patch.object(torch.distributed, "init_process_group", lambda *_, **kwargs: asked.append(kwargs)):
        start_process_group(device, timeout_s=1234.0)
        assert asked.pop()["timeout"].total_seconds() == collective_timeout().total_seconds() == 1234
        start_process_group(device)
        assert asked.pop()["timeout"].total_seconds() == UNWATCHED_TIMEOUT_S
    set_collective_timeout(UNWATCHED_TIMEOUT_S)
