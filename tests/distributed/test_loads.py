"""Expert loads and biases of real steps against a recount by hand, whatever runs a router more than once."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from dsv3_megatron.config.memory import RECOMPUTE_MODULES
from dsv3_megatron.model.recomputed_modules import set_recomputed
from dsv3_megatron.model.router import DeepSeekRouter
from dsv3_megatron.optim.router_bias import routers
from tests.distributed import small_run as harness
from tests.distributed.launch import run_ranks
from tests.distributed.small_run import GLOBAL_BATCH, SEQ_LENGTH, Training, small_run, start

pytestmark = pytest.mark.distributed

Counts = dict[int, list[int]]
# Nothing is computed again, everything that can be by name, whole layers.
MODES = ("", "selective", "full")


def chosen_by_hand(scores: list[float], bias: list[float], *, top_k: int, groups: int, kept_groups: int) -> list[int]:
    """Experts of one token: the best groups by the sum of their top_k / kept_groups best, then the best of these."""
    biased = [score + offset for score, offset in zip(scores, bias, strict=True)]
    size = len(biased) // groups

    def group_score(group: int) -> float:
        return sum(sorted(biased[group * size:(group + 1) * size], reverse=True)[:max(1, top_k // kept_groups)])

    kept = sorted(range(groups), key=group_score, reverse=True)[:kept_groups]
    candidates = [expert for group in kept for expert in range(group * size, (group + 1) * size)]
    return sorted(candidates, key=lambda expert: biased[expert], reverse=True)[:top_k]


def recount(training: Training, inputs: list[tuple[DeepSeekRouter, torch.Tensor]], biases: dict[int, list[float]]
            ) -> Counts:
    """This rank's tokens by expert, for each row of the load table, from what its routers read."""
    model = training.run.model
    rows = {router: row for row, router in routers(training.chunks, model.num_layers)}
    counts = {row: [0] * model.num_experts for row in rows.values()}
    for router, hidden in inputs:
        row = rows[router]
        affinities = torch.sigmoid(hidden.flatten(0, 1) @ router.weight.detach().t())
        for scores in affinities.tolist():
            for expert in chosen_by_hand(scores, biases[row], top_k=model.moe_router_topk,
                                         groups=model.moe_router_num_groups, kept_groups=model.moe_router_group_topk):
                counts[row][expert] += 1
    return counts


def set_mode(training: Training, mode: str) -> None:
    """As a run with this recompute_granularity has it from the start."""
    set_recomputed(training.chunks, RECOMPUTE_MODULES if mode == "selective" else ())
    config = training.config
    config.recompute_granularity = "full" if mode == "full" else None
    config.recompute_method, config.recompute_num_layers = ("uniform", 1) if mode == "full" else (None, None)


def steps_in_every_mode(changes: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each step: a recount of this rank's tokens, what was collected, biases before and after."""
    training = start(small_run(**changes))
    mode = ""
    inputs: list[tuple[DeepSeekRouter, torch.Tensor]] = []

    def note(router: DeepSeekRouter, arguments: tuple[torch.Tensor, ...]) -> None:
        # Whole layers run forward without gradients first; the MTP modules' too.
        if torch.is_grad_enabled() != (mode == "full"):
            inputs.append((router, arguments[0].detach().clone()))

    for _, router in routers(training.chunks, training.run.model.num_layers):
        router.register_forward_pre_hook(note)
    steps = []
    collect = harness.all_expert_loads
    for number, mode in enumerate(MODES * 2):
        set_mode(training, mode)
        inputs.clear()
        before = biases_of(training)
        collected: list[torch.Tensor] = []

        def keep(*args: Any, to: list[torch.Tensor] = collected, **kwargs: Any) -> Any:
            loads, losses = collect(*args, **kwargs)
            to.append(loads.clone())
            return loads, losses

        # The weights that routed are gone after the step.
        weights = [(router, router.weight.detach().clone()) for _, router in routers(training.chunks, 0)]
        with mock.patch.object(harness, "all_expert_loads", keep):
            training.step(number)
        after = [router.weight.detach().clone() for router, _ in weights]
        for router, weight in weights:
            router.weight.data.copy_(weight)
        steps.append({"recount": recount(training, inputs, before), "loads": collected[0], "before": before,
                      "after": biases_of(training), "rate": 0.01 * (number + 1)})
        for (router, _), weight in zip(weights, after, strict=True):
            router.weight.data.copy_(weight)
    return steps


def biases_of(training: Training) -> dict[int, list[float]]:
    return {row: router.expert_bias.tolist() for row, router in routers(training.chunks, training.run.model.num_layers)}


@pytest.mark.parametrize(("ranks", "changes"), [
    (1, {"mtp_num_layers": 2}),  # and four micro-batches
    (2, {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}),
    (2, {"pipeline_model_parallel_size": 2, "pipeline_schedule": "dualpipe"}),
    (4, {"expert_model_parallel_size": 2}),
], ids=["accumulation, two MTP modules", "interleaved PP2", "DualPipe", "EP2 x DP2"])
def test_loads_and_biases_equal_a_recount(ranks, changes):
    model = small_run(**changes).model
    by_rank = run_ranks(ranks, steps_in_every_mode, changes)
    for number, steps in enumerate(zip(*by_rank, strict=True)):
        loads = steps[0]["loads"]
        assert loads.dtype == torch.int64
        total = torch.zeros_like(loads)
        for step in steps:
            assert torch.equal(step["loads"], loads)
            for row, counts in step["recount"].items():
                total[row] += torch.tensor(counts)
        assert torch.equal(total, loads), MODES[number % len(MODES)]
        rows = set().union(*(step["recount"] for step in steps))
        assert rows == set(range(1, model.num_layers + model.mtp_num_layers))
        for row in rows:
            assert int(loads[row].sum()) == GLOBAL_BATCH * SEQ_LENGTH * model.moe_router_topk
        for step in steps:
            check_biases(step, loads.tolist())


def check_biases(step: dict[str, Any], loads: list[list[int]]) -> None:
    """b_i += rate * sign(mean load - load_i), in fp32."""
    for row, before in step["before"].items():
        mean = sum(loads[row]) / len(loads[row])
        signs = [(mean > load) - (mean < load) for load in loads[row]]
        expected = torch.tensor(before) + step["rate"] * torch.tensor(signs, dtype=torch.float32)
        assert torch.equal(torch.tensor(step["after"][row]), expected)


def train_long() -> dict[int, list[float]]:
    training = start(small_run(num_layers=2, expert_model_parallel_size=2))
    for number in range(60):
        with mock.patch.object(harness, "update_router_biases", constant_rate):
            training.step(number)
    return biases_of(training)


def constant_rate(*args: Any, update_rate: float, **kwargs: Any) -> None:
    """The harness's rate rises with the step."""
    from dsv3_megatron.optim.router_bias import update_router_biases

    update_router_biases(*args, update_rate=1e-3, **kwargs)


def test_biases_of_all_replicas_are_the_same_bits_after_60_steps():
    first, *others = run_ranks(4, train_long)
    assert set(first) == {1, 2}
    assert all(any(abs(value) >= 0.01 for value in bias) for bias in first.values()), "the biases have hardly moved"
    assert all(other == first for other in others)
