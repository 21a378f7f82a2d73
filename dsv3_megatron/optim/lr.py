"""Learning rate of each optimizer step. Pure Python."""

from __future__ import annotations

import math

from dsv3_megatron.config.training import TrainingConfig


def learning_rate(training: TrainingConfig, iteration: int) -> float:
    """Learning rate of step `iteration`, counted from 0.

    Linear warm-up from lr / warm-up steps to lr, then the decay style's way from lr to min_lr, reached
    at lr_decay_iters and kept from there on.
    """
    if iteration < training.lr_warmup_iters:
        return training.lr * (iteration + 1) / training.lr_warmup_iters
    if training.lr_decay_style == "constant":
        return training.lr
    end = training.train_iters if training.lr_decay_iters is None else training.lr_decay_iters
    if iteration >= end:
        return training.min_lr
    progress = (iteration - training.lr_warmup_iters) / max(1, end - training.lr_warmup_iters)
    if training.lr_decay_style == "linear":
        share = 1.0 - progress
    else:
        share = 0.5 * (1.0 + math.cos(math.pi * progress))
    return training.min_lr + share * (training.lr - training.min_lr)
