"""Small runs of which the routing is noted: what `test_routing.py` and others run in each process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from megatron.core import parallel_state

from dsv3_megatron.certification.routing_notes import Notes, RoutingWatch
from dsv3_megatron.model.router import DeepSeekRouter
from dsv3_megatron.optim.router_bias import routers
from tests.distributed.small_run import Training, small_run, start


def noted_steps(training: Training, numbers: range, given: Notes | None = None) -> tuple[list[float], Notes]:
    """Losses and notes of some steps; passes are named "step N" with N from 1."""
    routing = RoutingWatch(given)
    losses = []
    with routing.watched():
        for number in numbers:
            routing.begin(f"step {number + 1}")
            losses.append(training.step(number))
    return losses, routing.notes


def _choosing(change: Any) -> Any:
    """Routers whose choice is one of changed affinities, by `change(router, scores_TE)`."""
    own = DeepSeekRouter.best_experts
    return mock.patch.object(DeepSeekRouter, "best_experts",
                             lambda router, scores_TE: own(router, change(router, scores_TE)))


def _rounded_otherwise(_router: DeepSeekRouter, scores_TE: torch.Tensor) -> torch.Tensor:
    """By a unit in the last place, up or down or not at all by the expert."""
    return scores_TE + 2.0**-24 * torch.tensor([-1.0, 0.0, 1.0, 0.0]).repeat(scores_TE.shape[1] // 4)


def _one_token_wrong(router: DeepSeekRouter, scores_TE: torch.Tensor) -> torch.Tensor:
    """The third token of a micro-batch takes its worst experts, in the main model's last layer."""
    changed_TE = scores_TE.clone()
    if router.layer_number == 4 and not router.is_mtp_layer:
        changed_TE[2] = 1 - changed_TE[2]
    return changed_TE


@contextlib.contextmanager
def fault(name: str, training: Training) -> Iterator[None]:
    """Something done to a run, on its last rank: nothing for "", "rounding", or what must be found."""
    is_last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
    with contextlib.ExitStack() as stack:
        if name == "rounding":
            stack.enter_context(_choosing(_rounded_otherwise))
        elif name == "one token" and is_last:
            stack.enter_context(_choosing(_one_token_wrong))
        elif name == "gradient" and is_last:
            finalize = training.config.finalize_model_grads_func

            def scaled(*args: Any, **kwargs: Any) -> None:
                for _, router in routers(training.chunks, training.run.model.num_layers):
                    router.weight.main_grad.mul_(1.02)  # type: ignore[attr-defined]
                finalize(*args, **kwargs)

            training.config.finalize_model_grads_func = scaled
        elif name == "bias" and is_last:
            for _, router in routers(training.chunks, training.run.model.num_layers):
                router.expert_bias[0] += 1e-7
        yield


def equal_experts(training: Training) -> None:
    """Give three experts of each group of four equal affinities, to the bit: of two that are chosen one has an equal.
    """
    with torch.no_grad():
        for _, router in routers(training.chunks, training.run.model.num_layers):
            router.weight[1::4] = router.weight[2::4] = router.weight[0::4]
    training.optimizer.reload_model_params()


def runs(cases: dict[str, tuple[dict[str, Any], bool, str]], steps: int, given: dict[str, Notes] | None
         ) -> dict[str, tuple[list[float], Notes]]:
    """Losses and notes by case.

    Args:
        cases: Changes of the run, whether experts are equal, and the fault.
        steps: To take in each.
        given: Choices to take, by case; where it has none, a run takes its own.
    """
    results = {}
    for name, (changes, are_equal, fault_name) in cases.items():
        training = start(small_run(**changes))
        if are_equal:
            equal_experts(training)
        with fault(fault_name, training):
            results[name] = noted_steps(training, range(steps), (given or {}).get(name))
        parallel_state.destroy_model_parallel()
    return results
