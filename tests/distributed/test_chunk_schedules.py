"""Plans of every schedule, executed on chunks of the model, leave the losses and gradients of one process.

Two pipeline ranks with experts on two ranks each: the executor's transfers between stages, the chunks' all-to-alls,
split backward passes and pairs that take turns, all at once.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dsv3_megatron.config.parallel import ParallelConfig
from dsv3_megatron.model.parameters import whole_parameters
from dsv3_megatron.optim.router_bias import routers
from dsv3_megatron.schedule.execute import Executor
from dsv3_megatron.schedule.plan import SCHEDULES, build_plan
from dsv3_megatron.schedule.transport import GroupTransport
from tests.distributed.chunk_passes import MICRO_BATCH_SIZE, SEQ_LENGTH, Case, Tensors, build, ordinary, random_batch
from tests.distributed.launch import run_ranks
from tests.parity.compare import relative_error

pytestmark = pytest.mark.distributed

PP, EP, NUM_MICROBATCHES = 2, 2, 4
# fp32 sums in another order, relative to each tensor's largest entry; the largest seen is 1e-6.
TOLERANCE = 5e-6


def case_of(schedule: str) -> Case:
    parallel = ParallelConfig(pipeline_model_parallel_size=PP, expert_model_parallel_size=EP,
                              num_virtual_stages_per_pipeline_rank=2 if schedule == "interleaved" else 1,
                              pipeline_schedule=schedule)
    return Case(schedule, PP * EP, parallel, num_microbatches=NUM_MICROBATCHES)


def step_of(case: Case) -> list[Tensors]:
    """Of this rank's chunks: gradients by whole parameter, loads and sums of losses; every rank reads the same data."""
    stages = build(case)
    for stage in stages:
        generator = torch.Generator().manual_seed(0)
        stage.batches = [random_batch(stage.run, generator) for _ in stage.batches]
    if case.num_ranks == 1:
        losses = [ordinary(stages[0]).outputs]
    else:
        losses = [{} for _ in stages]
        rank = torch.distributed.get_rank() // EP
        plan = build_plan(case.name, num_ranks=PP, num_microbatches=NUM_MICROBATCHES)
        chunks = [stage.chunk(first=place.direction * plan.microbatches_per_chunk)
                  for stage, place in zip(stages, plan.placement[rank], strict=True)]
        for stage in stages:
            stage.clear()
        Executor(plan, rank, transport_of(stages[0].run.model.hidden_size)).run(chunks)
        for stage, place, chunk, sums in zip(stages, plan.placement[rank], chunks, losses, strict=True):
            _, reports = chunk.take_reports()
            first = place.direction * plan.microbatches_per_chunk
            assert bool(reports) == stage.module.post_process
            sums |= {f"losses {first + number}": report["sums"] for number, report in enumerate(reports)}
    results = []
    for stage, sums in zip(stages, losses, strict=True):
        found = dict(sums)
        for whole in whole_parameters(stage.wrapped, stage.module.pg_collection):
            grad = whole.parameter.main_grad
            found[whole.name] = (grad if whole.expert is None else grad[whole.expert]).clone()
        for row, router in routers([stage.wrapped], stage.run.model.num_layers):
            found[f"load {row}"] = router.tokens_per_expert.clone()
        results.append(found)
    return results


def transport_of(hidden_size: int) -> GroupTransport:
    from megatron.core import parallel_state

    ascending = parallel_state.get_pipeline_model_parallel_group()
    ranks = torch.distributed.get_process_group_ranks(ascending)
    descending: Any = torch.distributed.new_group(ranks, use_local_synchronization=True)
    return GroupTransport(ascending, descending, shape=(SEQ_LENGTH, MICRO_BATCH_SIZE, hidden_size),
                          dtype=torch.float32, device=torch.device("cpu"))


def steps_of(cases: list[Case]) -> dict[str, list[Tensors]]:
    from megatron.core import parallel_state

    found = {}
    for case in cases:
        found[case.name] = step_of(case)
        parallel_state.destroy_model_parallel()
    return found


@pytest.fixture(scope="module")
def steps() -> dict[str, list[Tensors]]:
    """By schedule, and "one process": of all chunks of all ranks."""
    single = Case("one process", 1, num_microbatches=NUM_MICROBATCHES)
    found: dict[str, list[Tensors]] = {}
    for num_ranks, cases in ((1, [single]), (PP * EP, [case_of(schedule) for schedule in SCHEDULES])):
        ranks = run_ranks(num_ranks, steps_of, cases)
        found |= {case.name: [chunk for rank in ranks for chunk in rank[case.name]] for case in cases}
    return found


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_equals_one_process(steps, schedule):
    """Each expert has seen the tokens of both ranks, and all else is there twice: all sums are doubled."""
    (expected,) = steps["one process"]
    total: Tensors = {}
    for chunk in steps[schedule]:
        for name, value in chunk.items():
            total[name] = total[name] + value if name in total else value.clone()
    assert set(total) == set(expected)
    errors = {name: relative_error(value / EP, expected[name]) for name, value in total.items()}
    worst = max(errors, key=errors.__getitem__)
    print(schedule, worst, errors[worst])
    assert errors[worst] <= TOLERANCE, (worst, errors[worst])
    assert all(error == 0 for name, error in errors.items() if name.startswith("load"))
