"""What a rank holds at every action: against the simulator, and the same from some number of micro-batches on."""

from __future__ import annotations

import pytest

from dsv3_megatron.planning.memory.ledger import Turn
from dsv3_megatron.planning.memory.moments import Moment, peak_of, rank_moments, steady_microbatches
from dsv3_megatron.planning.memory.stage_cost import StageCost
from dsv3_megatron.schedule.actions import Kind
from dsv3_megatron.schedule.plan import PlanSizes, build_plan
from dsv3_megatron.schedule.simulate import Costs, simulate

SIZES = [(schedule, ranks, virtual) for schedule, virtual in (
    ("1f1b", None), ("interleaved", 2), ("interleaved", 3), ("zb1p", None), ("zbv", None), ("dualpipe", None),
    ("dualpipev", None)) for ranks in (2, 4, 8)]


def moments(schedule: str, ranks: int, microbatches: int, virtual: int | None, rank: int) -> tuple[Moment, ...]:
    return rank_moments(PlanSizes(schedule, ranks, microbatches, virtual), rank, 1)


@pytest.mark.parametrize(("schedule", "ranks", "virtual"), SIZES)
def test_as_many_chunks_are_held_as_the_simulator_says(schedule: str, ranks: int, virtual: int | None) -> None:
    microbatches = 4 * ranks
    plan = build_plan(schedule, num_ranks=ranks, num_microbatches=microbatches, virtual_stages=virtual)
    held = simulate(plan, Costs.uniform(plan.num_stages, forward=1, backward=2, weight=1)).peak_activations
    for rank in range(ranks):
        most = max(sum(moment.kept) + sum(moment.deferred)
                   + sum(kind is Kind.FORWARD for kind, _ in moment.operations)
                   for moment in moments(schedule, ranks, microbatches, virtual, rank))
        assert most == held[rank]


@pytest.mark.parametrize(("schedule", "ranks", "virtual"), SIZES)
def test_more_micro_batches_hold_no_more(schedule: str, ranks: int, virtual: int | None) -> None:
    for microbatches in (6 * ranks, 10 * ranks):
        assert steady_microbatches(ranks, microbatches) == 4 * ranks
        for rank in range(ranks):
            few = moments(schedule, ranks, 4 * ranks, virtual, rank)
            assert set(few) == set(moments(schedule, ranks, microbatches, virtual, rank))


@pytest.mark.parametrize(("schedule", "ranks", "virtual"), SIZES)
def test_longer_tensors_across_the_last_boundary(schedule: str, ranks: int, virtual: int | None) -> None:
    """Ranks with neither of its stages hold what they held; on two ranks with a stage each all tensors cross it."""
    sizes = PlanSizes(schedule, ranks, 4 * ranks, virtual)
    plan = build_plan(schedule, num_ranks=ranks, num_microbatches=4 * ranks, virtual_stages=virtual)
    last = {plan.num_stages - 1, plan.num_stages - 2}
    for rank, places in enumerate(plan.placement):
        plain, longer = (rank_moments(sizes, rank, 4, length) for length in (1, 3))
        if not last & {place.stage for place in places}:
            assert longer == plain
        elif plan.num_stages == 2:
            assert longer == tuple(moment._replace(on_the_way=3 * moment.on_the_way) for moment in plain)
        else:
            most, least = (max(moment.on_the_way for moment in found) for found in (longer, plain))
            assert least < most <= 3 * least


def cost(kept: int, forward: tuple[Turn, ...], backward: tuple[Turn, ...]) -> StageCost:
    return StageCost(forward, backward, Turn(0, 0), backward, Turn(0, 0), {"kept": kept}, {}, 1)


def test_a_pair_takes_turns_with_the_backward_first() -> None:
    moment = Moment((1, 2), (0, 0), 3, ((Kind.FORWARD, 0), (Kind.BACKWARD, 1)))
    first = cost(10, (Turn(5, 5), Turn(7, 5)), ())
    second = cost(100, (), (Turn(50, -60), Turn(1, -40)))
    # 210 kept, 3 on their way; the backward's first turn is the peak: 50.
    peak = peak_of((moment,), (first, second))
    assert (peak.kept, peak.deferred, peak.on_the_way, peak.working, peak.total) == (210, 0, 3, 50, 263)
    # Were the backward's turns to free nothing, the forward's would come on top of them: 2 + 5 + 2 + 7.
    second = cost(100, (), (Turn(2, 2), Turn(2, 2)))
    assert peak_of((moment,), (first, second)).working == 2 + 5 + 2 + 7
