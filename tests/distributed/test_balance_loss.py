"""The balance loss counts alpha times its mean over sequences, in the value and in the gradient, whatever is masked.

So does one that is added by one function, under every split: of a sequence's whole sums, which no rank has alone.

What it adds to a gradient is the gradient of a step with it less that of a step without it. It is compared with the
reference's in float64, which knows no mask. Source: DeepSeek-V3 report, eq. 17-20.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dsv3_megatron.certification import reference
from dsv3_megatron.certification.rank_step import RankStep, whole_tensors
from dsv3_megatron.certification.reference import losses
from dsv3_megatron.certification.weight_names import whole_from_reference
from dsv3_megatron.config.router_functions import balance_loss
from tests.distributed.launch import run_ranks
from tests.distributed.layout_step import MASKS, Layout, random_samples, run_layouts
from tests.distributed.test_layouts import split
from tests.parity.architectures import reference_weights
from tests.parity.compare import relative_error

pytestmark = pytest.mark.distributed

# Of the difference of two fp32 gradients, the balance losses' part of which is about as large as the other: relative to
# a router's largest entry. Largest seen 2e-6. A loss that grows with the mask is off by 0.3 to 7.
TOLERANCE = 5e-5
ALPHA = 1.0
SPLITS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "one process": (1, {}, {}),
    "dp2": (2, {}, {}),
    "tp2": (2, {"tp": 2}, {}),
    "pp2-interleaved": (2, {"pp": 2, "vpp": 2}, {"recompute_granularity": "full"}),
    "dualpipe-pp2": (2, {"pp": 2, "schedule": "dualpipe"}, {"recompute_granularity": "selective"}),
    "zbv-pp2": (2, {"pp": 2, "schedule": "zbv"}, {}),
    "ep2": (2, {"ep": 2}, {}),
}
CASES = [(name, mask) for name in SPLITS for mask in (MASKS if name in ("one process", "dp2", "dualpipe-pp2") else
                                                      ["the first quarter"])]


def layout(name: str, mask: str, alpha: float) -> Layout:
    num_ranks, degrees, changes = SPLITS[name]
    return Layout(f"{name}, {mask}, {alpha}", num_ranks, split(**degrees), mask=mask, balance_loss_alpha=alpha,
                  **changes)


@pytest.fixture(scope="module")
def steps() -> dict[str, list[RankStep]]:
    """What each rank has of a step, by layout, with and without balance losses."""
    found = {}
    for num_ranks in (1, 2):
        layouts = [layout(*case, alpha) for case in CASES for alpha in (ALPHA, 0.0) if SPLITS[case[0]][0] == num_ranks]
        ranks = run_ranks(num_ranks, run_layouts, layouts, timeout_s=280)
        found |= {one.name: [rank[one.name] for rank in ranks] for one in layouts}
    return found


@pytest.fixture(scope="module")
def expected() -> tuple[float, dict[str, torch.Tensor]]:
    """The mean balance loss of a layer before alpha, and the gradient of all layers' by the routers' weights."""
    model = Layout("", 1).run.model
    samples = random_samples(model.vocab_size, mask="all")
    weights = {name: weight.requires_grad_(name.endswith("gate.weight"))
               for name, weight in reference_weights(model).items()}
    found = losses(weights, model, samples.tokens[:, :-1], samples.tokens[:, 1:], balance_loss_alpha=ALPHA)
    found.balance_loss.backward()
    return (found.balance_loss.item() / ALPHA / len(found.balance_losses),
            {name: weight.grad for name, weight in weights.items() if weight.grad is not None})


@pytest.mark.parametrize(("name", "mask"), CASES)
def test_value_and_gradient_do_not_know_the_mask(steps, expected, name, mask):
    value, gradients = expected
    ranks = steps[layout(name, mask, ALPHA).name]
    for rank in ranks:
        assert rank.report.balance_loss == pytest.approx(value, rel=1e-6)
    assert sum(sum(load) for load in ranks[0].report.expert_load.values()) > 0
    with_it, without = (whole_tensors(rank.gradients for rank in steps[layout(name, mask, alpha).name])
                        for alpha in (ALPHA, 0.0))
    routers = [parameter for parameter in with_it if parameter.endswith("router.weight")]
    assert len(routers) == len(gradients) == 4
    for parameter in routers:
        wanted = whole_from_reference(parameter, gradients, 4)
        error = relative_error(with_it[parameter] - without[parameter], wanted)
        print(name, mask, parameter, error)
        assert error < TOLERANCE, parameter


def test_no_token_that_counts(steps):
    """The mask of one sequence leaves a micro-batch, and a replica under DP, without any."""
    assert MASKS["one sequence"]().view(2, -1).sum(1).tolist() == [16.0, 0.0]


# -- a balance loss of one's own ---------------------------------------------------------------------------


def squares(load_BE: torch.Tensor, share_BE: torch.Tensor) -> torch.Tensor:
    """Not linear in the shares, so that the parts of a split sequence do not add up."""
    return (load_BE.square() * share_BE.square()).sum(-1) * share_BE.shape[-1]


def run_with_squares(layouts: list[Layout]) -> dict[str, RankStep]:
    balance_loss(squares)  # in this rank, which does nothing else
    return run_layouts(layouts)


def squares_by_hand(scores_BSE: torch.Tensor, *, top_k: int, alpha: float) -> torch.Tensor:
    """The same in loops over sequences, tokens and experts; mean over the sequences."""
    batch, length, experts = scores_BSE.shape
    total = torch.zeros((), dtype=scores_BSE.dtype)
    for scores_SE in scores_BSE:
        counts = [0] * experts
        for scores_E in scores_SE.tolist():
            for expert in sorted(range(experts), key=lambda expert: -scores_E[expert])[:top_k]:
                counts[expert] += 1
        for expert in range(experts):
            load = counts[expert] * experts / (top_k * length)
            share = torch.stack([scores_E[expert] / scores_E.sum() for scores_E in scores_SE]).sum() / length
            total = total + alpha * experts * load ** 2 * share ** 2
    return total / batch


OWN_SPLITS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}), "tp2": (2, {"tp": 2}), "cp2": (2, {"cp": 2}), "pp2-ep2": (4, {"pp": 2, "ep": 2})}


def test_one_function_is_a_balance_loss_under_every_split(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Layout("", 1).run.model
    samples = random_samples(model.vocab_size, mask="all")
    weights = {name: weight.requires_grad_(name.endswith("gate.weight"))
               for name, weight in reference_weights(model).items()}
    monkeypatch.setattr(reference, "sequence_balance_loss", squares_by_hand)
    found = losses(weights, model, samples.tokens[:, :-1], samples.tokens[:, 1:], balance_loss_alpha=ALPHA)
    found.balance_loss.backward()
    value = found.balance_loss.item() / ALPHA / len(found.balance_losses)
    for name, (num_ranks, degrees) in OWN_SPLITS.items():
        ranks = run_ranks(num_ranks, run_with_squares, [
            Layout(str(alpha), num_ranks, split(**degrees), mask="all", balance_loss_alpha=alpha,
                   balance_loss="squares") for alpha in (ALPHA, 0.0)])
        for rank in ranks:
            assert rank[str(ALPHA)].report.balance_loss == pytest.approx(value, rel=1e-6), name
        with_it, without = (whole_tensors(rank[str(alpha)].gradients for rank in ranks) for alpha in (ALPHA, 0.0))
        routers = [parameter for parameter in with_it if parameter.endswith("router.weight")]
        assert len(routers) == 4
        for parameter in routers:
            gradients = {key: weight.grad for key, weight in weights.items() if weight.grad is not None}
            error = relative_error(with_it[parameter] - without[parameter],
                                   whole_from_reference(parameter, gradients, 4))
            print(name, parameter, error)
            assert error < TOLERANCE, (name, parameter)
