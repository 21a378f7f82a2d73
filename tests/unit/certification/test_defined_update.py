"""AdamW by definition: torch's own in float64, and what a fault in a part of it would change."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dsv3_megatron.certification.defined_update import GradientOfStep, adamw_update, clip_factor
from dsv3_megatron.config.training import TrainingConfig

TRAINING = TrainingConfig(lr=0.05, min_lr=0.05, clip_grad=0.5, adam_eps=1e-3, weight_decay=0.1)


def torch_steps(gradients: list[GradientOfStep], start: torch.Tensor, *, decay: float) -> torch.Tensor:
    weight = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([weight], lr=TRAINING.lr, betas=(TRAINING.adam_beta1, TRAINING.adam_beta2),
                                  eps=TRAINING.adam_eps, weight_decay=decay)
    for step in gradients:
        weight.grad = step.gradient * min(1.0, 0.5 / (step.norm + 1e-6))
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("is_decayed", [True, False])
def test_the_update_is_that_of_torch(is_decayed: bool) -> None:
    torch.manual_seed(0)
    gradients = [GradientOfStep(torch.randn(7, 5, dtype=torch.float64) * 0.1, norm) for norm in (3.0, 0.2, 1.0)]
    start = torch.randn(7, 5, dtype=torch.float64)
    decay = TRAINING.weight_decay if is_decayed else 0.0
    before = start
    for count in range(1, 4):
        update = adamw_update(TRAINING, before, gradients[:count], is_decayed=is_decayed)
        expected = torch_steps(gradients[:count], start, decay=decay)
        torch.testing.assert_close(update.value, expected, rtol=1e-14, atol=1e-15)
        assert (update.size >= before.abs()).all()
        before = update.value


def test_fp32_is_within_the_tolerance_and_a_thousandth_of_epsilon_is_not() -> None:
    from dsv3_megatron.certification.comparison import FP32

    torch.manual_seed(0)
    steps = [GradientOfStep(torch.randn(4000) * 10.0 ** -torch.randint(0, 8, (4000,)), 40.0) for _ in range(2)]
    start, before = torch.randn(4000) * 0.05, torch.randn(4000)
    weight = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([weight], lr=0.05, betas=(TRAINING.adam_beta1, TRAINING.adam_beta2), eps=1e-3,
                                  weight_decay=0.1, fused=True)
    for step in steps:
        before = weight.detach().clone()
        weight.grad = step.gradient * (0.5 / (40.0 + 1e-6))
        optimizer.step()
    found = weight.detach().double()

    def error(training: TrainingConfig) -> float:
        update = adamw_update(training, before, steps, is_decayed=True)
        return float(((found - update.value).abs() / update.size).max())

    assert error(TRAINING) < FP32.update
    for wrong in ({"adam_eps": 1.001e-3}, {"adam_beta2": TRAINING.adam_beta2 + 1e-5}, {"weight_decay": 0.101},
                  {"lr": 0.05 * (1 + 1e-5)}, {"clip_grad": 0.50001}):
        assert error(dataclasses.replace(TRAINING, **wrong)) > FP32.update, wrong  # type: ignore[arg-type]


def test_clipping() -> None:
    assert clip_factor(TRAINING, 0.4) == 1.0
    assert clip_factor(TRAINING, 2.0) == pytest.approx(0.25, rel=1e-6)
    assert clip_factor(dataclasses.replace(TRAINING, clip_grad=0.0), 1e9) == 1.0
