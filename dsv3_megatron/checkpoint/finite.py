"""Weights that are numbers: a NaN or an infinity in one of them makes everything that a model says worthless."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from dsv3_megatron.checkpoint.agreement import from_all_ranks
from dsv3_megatron.checkpoint.folder import CheckpointError
from dsv3_megatron.model.global_names import whole_parameters


def require_finite_weights(stages: Sequence[torch.nn.Module], groups: Any, load: str) -> None:
    """Refuse loaded weights that hold NaN or an infinity; called by every rank.

    Every weight and buffer is read once.

    Args:
        stages: This rank's stages, filled.
        groups: The run's process groups.
        load: Folder that they were loaded from, for the message.

    Raises:
        CheckpointError: on every rank; names the first such tensor of each rank and says how many of its values it is.
    """
    damaged = [f"{name} ({int((~tensor.isfinite()).sum())} of {tensor.numel()} values)"
               for name, tensor in _tensors(stages, groups)
               if tensor.is_floating_point() and not bool(tensor.isfinite().all())]
    more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
    text = from_all_ranks([damaged[0] + more] if damaged else [], "")
    if text:
        raise CheckpointError(f"load={load}: the weights are not finite: {text}; use an earlier checkpoint, or make or "
                              "convert this one again")


def _tensors(stages: Sequence[torch.nn.Module], groups: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight by its global name, and every buffer, such as the routers' biases, by its path in the stage."""
    for stage in stages:
        with torch.no_grad():
            yield from itertools.chain(((whole.name, whole.local) for whole in whole_parameters(stage, groups)),
                                       stage.named_buffers())
