"""AdamW by definition, in float64: what a parameter is after a step, given its gradients; and the check of a run by it.

AdamW's first update is nearly a gradient's sign, so two sound runs can move an entry whose gradient is near zero in
opposite directions. Their parameters are therefore not held against each other. Their gradients are, and each run's
parameters are held against AdamW written out, given this run's own gradients: to a few roundings of fp32, entry by
entry, in whatever precision the gradients were computed. Together this leaves nothing out: equal weights, gradients
that are equal within their tolerance, and the update of exactly those.

Source: Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2; the bias corrections of Kingma and Ba 2015.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dsv3_megatron.config.training import TrainingConfig

# What Megatron-Core adds to the norm before it divides by it.
CLIP_EPS = 1e-6


@dataclass(frozen=True)
class GradientOfStep:
    """A parameter's gradient in one step, or a part of it.

    Attributes:
        gradient: Not clipped.
        norm: L2 norm of the whole model's gradient, by which it is clipped.
    """

    gradient: torch.Tensor
    norm: float


@dataclass(frozen=True)
class Update:
    """What AdamW makes of a parameter.

    Attributes:
        value: float64, the parameter after the step.
        size: float64, magnitudes of what is added up for each entry: what fp32's rounding is relative to.
    """

    value: torch.Tensor
    size: torch.Tensor


def clip_factor(training: TrainingConfig, norm: float) -> float:
    """Factor on all gradients that brings their norm down to `clip_grad`; 1 where it is not above, or 0 is set."""
    return min(1.0, training.clip_grad / (norm + CLIP_EPS)) if training.clip_grad else 1.0


def adamw_update(training: TrainingConfig, before: torch.Tensor, steps: Sequence[GradientOfStep], *, is_decayed: bool
                 ) -> Update:
    """Compute a parameter after AdamW's newest step.

    Args:
        training: Learning rate, betas, epsilon, decay and clipping.
        before: The parameter before the newest step.
        steps: Gradients of all steps so far, from zero moments on, the newest last.
        is_decayed: Whether the parameter is decayed: matrices are.
    """
    beta1, beta2, number = training.adam_beta1, training.adam_beta2, len(steps)
    first, second, size = (torch.zeros(before.shape, dtype=torch.float64) for _ in range(3))
    for step in steps:
        clipped = clip_factor(training, step.norm) * step.gradient.double()
        first = beta1 * first + (1 - beta1) * clipped
        size = beta1 * size + (1 - beta1) * clipped.abs()
        second = beta2 * second + (1 - beta2) * clipped**2
    denominator = (second / (1 - beta2**number)).sqrt() + training.adam_eps
    per_unit = training.lr / (1 - beta1**number) / denominator
    before = before.detach().double()
    decay = training.lr * training.weight_decay if is_decayed else 0.0
    return Update((1 - decay) * before - per_unit * first, before.abs() + per_unit * size)
