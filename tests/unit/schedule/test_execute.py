"""The executor runs every plan: right results, no deadlock, no more memory than promised, errors that say where.

Ranks are threads here, on a transport without buffers; `tests/distributed/test_executor.py` has processes.
"""

from __future__ import annotations

import random
import threading
import time
from functools import partial

import pytest
import torch

from dsv3_megatron.schedule.actions import Action, Kind
from dsv3_megatron.schedule.execute import Executor, take_turns
from dsv3_megatron.schedule.formulas import activation_bound
from dsv3_megatron.schedule.plan import SCHEDULES, Plan
from dsv3_megatron.schedule.transfers import RECEIVE_AHEAD
from dsv3_megatron.schedule.validate import peak_activations
from tests.unit.schedule.arithmetic_stages import (
    Memory,
    MultiplyingStage,
    Rendezvous,
    StrictThreadTransport,
    ThreadTransport,
    expected_weight_grad,
    run_threads,
)
from tests.unit.schedule.sizes import FORMS, any_number, fewest, form, has_ranks, step

NUM_COMPOSITIONS = 500
TIME_LIMIT_S = 120.0


def run_plan(plan: Plan, *, num_steps: dict[int, int] | None = None, num_columns: int = 1,
             transport: type[ThreadTransport] = ThreadTransport) -> tuple[list[list[MultiplyingStage]], list[Memory]]:
    """Run a step of a plan in threads.

    Args:
        plan: To run.
        num_steps: Turns of a pass by stage, 1 if not given.
        num_columns: Pipelines side by side, whose ranks of one number meet in every turn, as experts' ranks do.
        transport: Between ranks.

    Returns:
        The stages of the first column by rank, and what each rank held.
    """
    barriers = [threading.Barrier(num_columns, timeout=20) for _ in range(plan.num_ranks)]
    names: list[list[str]] = [[] for _ in range(plan.num_ranks)]
    ranks: list[list[MultiplyingStage]] = []
    memories: list[Memory] = []
    work = []

    def meet(rank: int, column: int, name: str) -> None:
        if num_columns > 1:
            if column == 0:
                names[rank].append(name)
            barriers[rank].wait()
            assert names[rank][-1] == name, "both are at one collective"
            barriers[rank].wait()

    for column in range(num_columns):
        rendezvous = Rendezvous()
        for rank in range(plan.num_ranks):
            memory = Memory()
            stages = [MultiplyingStage(plan, rank, chunk, memory=memory, meet=partial(meet, rank, column),
                                       num_steps=(num_steps or {}).get(plan.placement[rank][chunk].stage, 1))
                      for chunk in range(plan.num_chunks)]
            executor = Executor(plan, rank, transport(rendezvous, rank))
            work.append(partial(executor.run, stages))
            if column == 0:
                ranks.append(stages)
                memories.append(memory)
    run_threads(work)
    return ranks, memories


def check_results(plan: Plan, ranks: list[list[MultiplyingStage]]) -> None:
    for stages in ranks:
        for stage in stages:
            assert stage.weight_grad == expected_weight_grad(plan, stage.place), stage.place
            if stage.is_last:
                assert stage.loss == stage.weight * stage.weight_grad
            assert not stage.held


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("transport", [ThreadTransport, StrictThreadTransport])
def test_results_and_memory(name: str, transport: type[ThreadTransport]) -> None:
    for num_ranks in (2, 4):
        plan = form(name, num_ranks, fewest(name, num_ranks) + 2 * step(name, num_ranks))
        ranks, memories = run_plan(plan, transport=transport)
        check_results(plan, ranks)
        assert [memory.alive for memory in memories] == [0] * num_ranks
        held = tuple(memory.peak for memory in memories)
        assert held == peak_activations(plan)
        assert all(number <= bound for number, bound in zip(held, activation_bound(plan), strict=True))


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("name", FORMS)
def test_both_sides_know_which_tensors_are_longer(name: str, num_ranks: int) -> None:
    """Those of the last boundary between stages, forward and backward, if it lies between two ranks."""
    plan = form(name, num_ranks, fewest(name, num_ranks) + step(name, num_ranks))
    rendezvous = Rendezvous()
    sent: dict[tuple[int, int], list[int]] = {}
    expected: dict[tuple[int, int], list[int]] = {}

    class Noting(ThreadTransport):
        def send(self, tensor, destination, length):
            sent.setdefault((self.rank, destination), []).append(length)
            super().send(tensor, destination, length)

        def receive(self, source, length):
            expected.setdefault((source, self.rank), []).append(length)
            return super().receive(source, length)

    lengths = {plan.num_stages - 2: 3}
    run_threads([partial(Executor(plan, rank, Noting(rendezvous, rank), lengths).run,
                         [MultiplyingStage(plan, rank, chunk) for chunk in range(plan.num_chunks)])
                 for rank in range(plan.num_ranks)])
    assert sent == expected
    crossing = sum(plan.holders[place] != plan.holders[place._replace(stage=place.stage - 1)]
                   for place in plan.holders if place.stage == plan.num_stages - 1)
    found = [length for own in sent.values() for length in own]
    assert found.count(3) == 2 * crossing * plan.microbatches_per_chunk > 0
    assert set(found) <= {1, 3}


def test_the_bound_is_reached() -> None:
    """With enough micro-batches the measured peak is the published one, not less."""
    for name in SCHEDULES:
        plan = form(name, 4, 16)
        _, memories = run_plan(plan)
        assert tuple(memory.peak for memory in memories) == activation_bound(plan), name


def test_random_compositions_do_not_deadlock() -> None:
    """Schedule x ranks x micro-batches x chunks x turns of each stage x one or two columns of ranks."""
    rng = random.Random(0)
    started = time.monotonic()
    seen = set()
    for number in range(NUM_COMPOSITIONS):
        name = rng.choice(FORMS)
        num_ranks = rng.choice([ranks for ranks in range(1, 7) if has_ranks(name, ranks)])
        plan = form(name, num_ranks, any_number(name, num_ranks, rng), rng.randint(2, 3))
        turns = {stage: rng.randint(0, 3) for stage in range(plan.num_stages)}
        ranks, _ = run_plan(plan, num_steps=turns, num_columns=1 + (number % 4 == 0),
                            transport=rng.choice([ThreadTransport, StrictThreadTransport]))
        check_results(plan, ranks)
        seen.add((name, num_ranks))
        assert time.monotonic() - started < TIME_LIMIT_S, f"only {number} of {NUM_COMPOSITIONS} within the time"
    assert {name for name, _ in seen} == set(FORMS)


def test_short_steps_of_dualpipe_do_not_deadlock() -> None:
    """60 plans of fewer micro-batches than fill the pipeline, down to the first."""
    rng = random.Random(2)
    for number in range(60):
        name = ("dualpipe", "dualpipev")[number % 2]
        num_ranks = rng.choice((2, 4, 6))
        count = rng.randrange(step(name, num_ranks), 2 * num_ranks, step(name, num_ranks))
        plan = form(name, num_ranks, count)
        turns = {stage: rng.randint(0, 3) for stage in range(plan.num_stages)}
        ranks, memories = run_plan(plan, num_steps=turns, num_columns=1 + (number % 4 == 0),
                                   transport=StrictThreadTransport)
        check_results(plan, ranks)
        if number % 4:
            assert tuple(memory.peak for memory in memories) == peak_activations(plan)


def test_turns_alternate_and_the_rest_comes_last() -> None:
    order = []

    def steps(name: str, number: int):
        for index in range(number):
            order.append(f"{name}{index}")
            yield
        order.append(f"{name}-end")
        return name

    assert take_turns([steps("b", 1), steps("f", 3)]) == ["b", "f"]
    assert order == ["b0", "f0", "b-end", "f1", "f2", "f-end"]


def test_of_a_pair_the_backward_has_the_first_turn() -> None:
    plan = form("dualpipev", 2, 8)
    order: list[str] = []
    pair = next(action for action in plan.actions[1] if action.is_overlapped)

    class Noting(MultiplyingStage):
        def forward_steps(self, microbatch, input_SBH):
            order.append(f"F{self.place.stage}.{microbatch}")
            return (yield from super().forward_steps(microbatch, input_SBH))

        def backward_steps(self, microbatch, grad_SBH, *, defer_weights):
            order.append(f"B{self.place.stage}.{microbatch}")
            return (yield from super().backward_steps(microbatch, grad_SBH, defer_weights=defer_weights))

    rendezvous = Rendezvous()
    run_threads([partial(Executor(plan, rank, ThreadTransport(rendezvous, rank)).run,
                         [(Noting if rank == 1 else MultiplyingStage)(plan, rank, chunk) for chunk in range(2)])
                 for rank in range(2)])
    forward, backward = (f"{operation.kind}{plan.placement[1][operation.chunk].stage}.{operation.microbatch}"
                         for operation in pair.operations)
    assert order.index(backward) == order.index(forward) - 1


def test_a_gradient_is_sent_before_the_last_weight_gradients() -> None:
    """Of full backwards, alone and in pairs; a rank that waits for the gradient does not wait for the weights."""
    plan = form("dualpipev", 2, 8)
    events: list[list[str]] = []  # of each action of rank 1

    class Sending(ThreadTransport):
        def send(self, tensor, destination, length):
            events[-1].append("send")
            super().send(tensor, destination, length)

    class Noting(MultiplyingStage):
        def backward_weight(self, microbatch):
            events[-1].append("weights")
            super().backward_weight(microbatch)

    class Starting:
        def begin(self, action: Action) -> None:
            events.append([])

        def end(self, action: Action) -> None:
            events[-1].append("complete")

    rendezvous = Rendezvous()
    run_threads([
        partial(Executor(plan, 0, ThreadTransport(rendezvous, 0)).run,
                [MultiplyingStage(plan, 0, chunk) for chunk in range(2)]),
        partial(Executor(plan, 1, Sending(rendezvous, 1)).run, [Noting(plan, 1, chunk) for chunk in range(2)],
                Starting())])
    for action, found in zip(plan.actions[1], events, strict=True):
        sent = sum((output := plan.output(1, operation)) is not None and plan.receiver(output) == 0
                   for operation in action.operations)
        has_weights = any(operation.kind in (Kind.BACKWARD, Kind.BACKWARD_WEIGHT) for operation in action.operations)
        assert found == ["send"] * sent + ["weights"] * has_weights + ["complete"], action


def test_receives_are_posted_ahead_and_only_a_little() -> None:
    """While an action runs the tensors of the next ones may arrive, and no more buffers than that stand ready."""
    plan = form("1f1b", 2, 8)
    posted: list[int] = []

    class Counting(ThreadTransport):
        def receive(self, source, length):
            posted[-1] += 1
            return super().receive(source, length)

    class Starting:
        def begin(self, action: Action) -> None:
            posted.append(0)

        def end(self, action: Action) -> None:
            pass

    rendezvous = Rendezvous()
    posted.append(0)
    run_threads([
        partial(Executor(plan, 0, ThreadTransport(rendezvous, 0)).run, [MultiplyingStage(plan, 0, 0)]),
        partial(Executor(plan, 1, Counting(rendezvous, 1)).run, [MultiplyingStage(plan, 1, 0)], Starting())])
    total = sum(posted)
    assert total == 8
    forwards_begun = posted_before = 0
    for action, number in zip(plan.actions[1], posted, strict=False):
        posted_before += number
        forwards_begun += action.operations[0].kind.value == "F"
        assert 0 <= posted_before - forwards_begun <= RECEIVE_AHEAD
    assert posted[0] > 1


def test_an_error_names_the_action() -> None:
    plan = form("dualpipev", 1, 2)

    class Failing(MultiplyingStage):
        def backward_steps(self, microbatch, grad_SBH, *, defer_weights):
            if microbatch == 1:
                raise ZeroDivisionError("no gradient")
            return (yield from super().backward_steps(microbatch, grad_SBH, defer_weights=defer_weights))

    with pytest.raises(ZeroDivisionError) as caught:
        Executor(plan, 0, ThreadTransport(Rendezvous(), 0)).run(
            [Failing(plan, 0, 0), MultiplyingStage(plan, 0, 1)])
    (note,) = caught.value.__notes__
    assert note.startswith("pipeline rank 0 was at ")
    assert note.endswith("of micro-batch 1 on stage 0 with the gradient of stage 1, micro-batch 1 from rank 0")


def test_a_stage_without_output_is_an_error() -> None:
    plan = form("1f1b", 2, 2)

    class Silent(MultiplyingStage):
        def forward_steps(self, microbatch, input_SBH):
            yield
            return None

    with pytest.raises(ValueError, match="chunk 0 returned nothing for the output of stage 0, micro-batch 0") as caught:
        Executor(plan, 0, ThreadTransport(Rendezvous(), 0)).run([Silent(plan, 0, 0)])
    assert "action 1 of 4" in caught.value.__notes__[0]


def test_received_tensors_are_let_go_of() -> None:
    """After the step nothing that went between ranks is alive."""
    plan = form("zbv", 2, 6)
    memory = Memory()

    class Watching(ThreadTransport):
        def send(self, tensor: torch.Tensor, destination: int, length: int = 1) -> None:
            memory.watch(tensor)
            super().send(tensor, destination, length)

    rendezvous = Rendezvous()
    run_threads([partial(Executor(plan, rank, Watching(rendezvous, rank)).run,
                         [MultiplyingStage(plan, rank, chunk) for chunk in range(2)]) for rank in range(2)])
    assert memory.peak > 0 and memory.alive == 0
