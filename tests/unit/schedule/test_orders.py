"""The order of every rank against the eight steps as text, torch's own pipeline schedules and Megatron-Core's table."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from torch.distributed.pipelining import schedules as torch_schedules

from dsv3_megatron.schedule.actions import Action
from dsv3_megatron.schedule.plan import PlacedStage, build_plan
from dsv3_megatron.schedule.simulate import simulate
from dsv3_megatron.schedule.validate import validate_plan
from tests.unit.schedule.costs import uniform
from tests.unit.schedule.sizes import form

# The eight steps: how often (h: distance to the near end, H: levels, m: micro-batches of a chunk), and what.
EIGHT_STEPS = (
    ("2*(H-h-1)", "F0"),
    ("h+1", "F0 F1"),
    ("H-h-1", "I1 W F1"),
    ("m-2*H+h+1", "F0&B1 F1&B0"),
    ("H-h-1", "B1 F1&B0"),
    ("h+1", "B1 B0"),  # the second half of these words is input-only
    ("H-h-1", "W I0"),
    ("h+1", "W"),
)


def eight_steps(h: int, H: int, m: int) -> list[str]:
    """The words of a rank, numbered: the n-th F, or B or I, of a chunk is micro-batch n; the n-th W is the n-th I's."""
    words: list[str] = []
    for number, (times, what) in enumerate(EIGHT_STEPS, start=1):
        step = what.split() * eval(times, {"h": h, "H": H, "m": m})
        if number == 6:
            half = len(step) // 2
            step[half:] = [word.replace("B", "I") for word in step[half:]]
        words += step
    counts: Counter[str] = Counter()
    input_only: list[str] = []
    numbered = []
    for word in words:
        parts = []
        for part in word.split("&"):
            if part == "W":
                counts["W"] += 1
                parts.append("W" + input_only[counts["W"] - 1])
                continue
            key = ("F" if part[0] == "F" else "B") + part[1]
            own = f"{part[1]}.{counts[key]}"
            counts[key] += 1
            parts.append(part[0] + own)
            if part[0] == "I":
                input_only.append(own)
        numbered.append(" & ".join(parts))
    return numbered


def texts(actions: tuple[Action, ...]) -> list[str]:
    return [str(action) for action in actions]


@pytest.mark.parametrize("num_ranks", range(2, 33))
def test_dualpipe_is_the_eight_steps(num_ranks: int) -> None:
    for more in (0, 6):
        m = 2 * num_ranks + more
        if num_ranks % 2 == 0:
            plan = build_plan("dualpipe", num_ranks=num_ranks, num_microbatches=m)
            for rank in range(num_ranks):
                h = min(rank, num_ranks - 1 - rank)
                assert texts(plan.actions[rank]) == eight_steps(h, num_ranks // 2, m // 2)
        plan = build_plan("dualpipev", num_ranks=num_ranks, num_microbatches=m)
        for rank in range(num_ranks):
            assert texts(plan.actions[rank]) == eight_steps(rank, num_ranks, m)


def test_the_eight_steps_by_hand() -> None:
    """Rank 0 of DualPipeV on two ranks, written down without a program."""
    plan = build_plan("dualpipev", num_ranks=2, num_microbatches=4)
    assert texts(plan.actions[0]) == [
        "F0.0", "F0.1",  # 1
        "F0.2", "F1.0",  # 2
        "I1.0", "W1.0", "F1.1",  # 3
        "F0.3 & B1.1", "F1.2 & B0.0",  # 4
        "B1.2", "F1.3 & B0.1",  # 5
        "B1.3", "I0.2",  # 6
        "W0.2", "I0.3",  # 7
        "W0.3",  # 8
    ]


def peer_order(name: str, num_ranks: int, num_microbatches: int, virtual_stages: int = 2) -> list[list]:
    """What torch's schedule would run, by rank, as (kind, stage, micro-batch), pairs flattened, waits left out."""
    peer = object.__new__(getattr(torch_schedules, name))  # its constructor wants modules; the order needs sizes only
    peer.pp_group_size, peer._n_microbatches = num_ranks, num_microbatches
    peer.n_local_stages, peer.num_stages = virtual_stages, virtual_stages * num_ranks
    peer.number_of_rounds = max(1, num_microbatches // num_ranks)
    peer.microbatches_per_round = num_microbatches // peer.number_of_rounds
    found = []
    for rank in range(num_ranks):
        peer.rank = rank
        order = [action for action in peer._calculate_single_rank_operations(rank) if action is not None]
        flat = [part for action in order for part in action.sub_actions or (action,)]
        found.append([(part.computation_type.value, part.stage_index, part.microbatch_index) for part in flat])
    return found


def own_order(name: str, num_ranks: int, num_microbatches: int, virtual_stages: int | None = None) -> list[list]:
    plan = form(name, num_ranks, num_microbatches, virtual_stages)
    return [[(str(operation.kind), plan.placement[rank][operation.chunk].stage, operation.microbatch)
             for action in actions for operation in action.operations] for rank, actions in enumerate(plan.actions)]


@given(st.integers(1, 10), st.integers(0, 12))
@settings(max_examples=25)
def test_v_shaped_orders_are_those_of_torch(num_ranks: int, more: int) -> None:
    m = 2 * num_ranks + more
    assert own_order("dualpipev", num_ranks, m) == peer_order("ScheduleDualPipeV", num_ranks, m)
    for number in (m, 1 + more):
        assert own_order("zbv", num_ranks, number) == peer_order("ScheduleZBVZeroBubble", num_ranks, number)


@given(st.integers(2, 8), st.integers(1, 4), st.integers(2, 4))
@settings(max_examples=25)
def test_interleaved_is_that_of_torch_and_of_megatron_core(num_ranks: int, rounds: int, virtual_stages: int) -> None:
    m = num_ranks * rounds
    own = own_order("interleaved", num_ranks, m, virtual_stages)
    assert own == peer_order("ScheduleInterleaved1F1B", num_ranks, m, virtual_stages)
    table = get_schedule_table(m, virtual_stages, num_ranks)
    for rank, order in enumerate(own):
        assert [(mb, stage // num_ranks) for kind, stage, mb in order if kind == "F"] == table
        assert [(mb, virtual_stages - 1 - stage // num_ranks) for kind, stage, mb in order if kind == "B"] == table
        assert {stage % num_ranks for _, stage, _ in order} == {rank}


@given(st.integers(2, 8), st.integers(1, 4), st.integers(2, 4))
@settings(max_examples=25)
def test_interleaved_pairs_are_independent(num_ranks: int, rounds: int, virtual_stages: int) -> None:
    """One warm-up forward more than without pairs, and the same work."""
    plain = form("interleaved", num_ranks, num_ranks * rounds, virtual_stages)
    paired = form("interleaved with pairs", num_ranks, num_ranks * rounds, virtual_stages)
    for own, other in zip(paired.actions, plain.actions, strict=True):
        assert {o for action in own for o in action.operations} == {o for action in other for o in action.operations}
        for action in own:
            if action.is_overlapped:
                forward, backward = action.operations
                assert (forward.chunk, forward.microbatch) != (backward.chunk, backward.microbatch)


@given(st.integers(1, 12), st.integers(1, 30))
def test_zero_bubble_is_1f1b_with_late_weights(num_ranks: int, num_microbatches: int) -> None:
    """Without its weight parts ZB1P is 1F1B; rank r's weight parts come r input parts late."""
    whole, split = own_order("1f1b", num_ranks, num_microbatches), own_order("zb1p", num_ranks, num_microbatches)
    for rank, (one, other) in enumerate(zip(whole, split, strict=True)):
        assert [(kind.replace("I", "B"), mb) for kind, _, mb in other if kind != "W"] == [
            (kind, mb) for kind, _, mb in one]
        for index, (kind, _, mb) in enumerate(other):
            if kind == "W":
                inputs = [done for name, _, done in other[:index] if name == "I"]
                assert len(inputs) == min(mb + 1 + rank, num_microbatches)


def test_mirrored_ranks_of_dualpipe() -> None:
    plan = build_plan("dualpipe", num_ranks=6, num_microbatches=14)
    assert plan.placement[1] == (PlacedStage(0, 1), PlacedStage(1, 4))
    assert plan.placement[4] == (PlacedStage(1, 1), PlacedStage(0, 4))
    assert [set(places) for places in zip(*plan.placement, strict=True)] == [
        {PlacedStage(d, s) for d in (0, 1) for s in (0, 1, 2)}, {PlacedStage(d, s) for d in (0, 1) for s in (3, 4, 5)}]
    assert all(plan.actions[rank] == plan.actions[5 - rank] for rank in range(6))
    assert (plan.num_stages, plan.num_directions, plan.microbatches_per_chunk) == (6, 2, 7)


def test_loss_of_v_shapes_is_on_rank_0() -> None:
    for name in ("zbv", "dualpipev"):
        plan = build_plan(name, num_ranks=5, num_microbatches=12)
        assert plan.holders[PlacedStage(0, plan.num_stages - 1)] == plan.holders[PlacedStage(0, 0)] == 0
        assert plan.holders[PlacedStage(0, 4)] == plan.holders[PlacedStage(0, 5)] == 4  # the local hand-over


@given(st.sampled_from(("dualpipe", "dualpipev")), st.integers(1, 8), st.data())
@settings(max_examples=60)
def test_a_short_step_of_dualpipe(schedule: str, half: int, data: st.DataObject) -> None:
    """Fewer micro-batches than fill the pipeline: no longer than a filled one, no more held, near what must be."""
    ranks = 2 * half
    count = 2 * data.draw(st.integers(1, ranks - 1))
    plan, filled = (build_plan(schedule, num_ranks=ranks, num_microbatches=number) for number in (count, 2 * ranks))
    validate_plan(plan)
    costs = {"forward": 2, "backward": 4, "weight": 2, "overlapped": 5}
    result, longest = (simulate(each, uniform(each, **costs)) for each in (plan, filled))
    assert result.step_time <= longest.step_time
    assert all(held <= most for held, most in zip(result.peak_activations, longest.peak_activations, strict=True))
    # One micro-batch has to go through all stages and back, and every rank has its work to do.
    through = 4 * plan.num_stages + 2
    work = 5 * count * plan.num_chunks // plan.num_directions
    assert max(through, work) <= result.step_time <= through + work
