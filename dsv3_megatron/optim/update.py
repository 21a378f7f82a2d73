"""An optimizer step in two halves, so that something can be decided between them: the norm, then the update.

Megatron-Core's optimizers do both in one `step()`, and in bf16 and fp32 they apply whatever gradient there is, NaN too.
These are its pieces in its order; nothing is computed twice, and a step that is applied gives the same bits.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer import MegatronOptimizer

from dsv3_megatron.optim.shards import distributed_parts


@torch.no_grad()
def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """Make the gradients ready for `apply_gradients`; their L2 norm over all ranks, which all call.

    NaN or Inf anywhere makes it so, but for a rank's copy of a parameter that tensor-parallel ranks share: that counts
    once, as `has_nonfinite_copy` says. No parameter and no state of the optimizer changes.
    """
    if optimizer.prepare_grads():  # a gradient scaler, which neither bf16 nor fp32 has, found one that is not finite
        return math.nan
    return float(optimizer.get_grad_norm())


@torch.no_grad()
def has_nonfinite_copy(optimizer: MegatronOptimizer) -> bool:
    """Whether NaN or Inf is in those of this rank's gradients that the norm leaves out; after `gradient_norm`."""
    for part in distributed_parts(optimizer):
        counted = {gradient.data_ptr() for gradient in part.get_grads_for_grad_norm()}
        for parameter in part.get_parameters():
            gradient = _gradient(part, parameter)
            if gradient is not None and gradient.numel() and gradient.data_ptr() not in counted \
                    and not bool(gradient.isfinite().all()):
                return True
    return False


@torch.no_grad()
def apply_gradients(optimizer: MegatronOptimizer, norm: float) -> None:
    """Clip the gradients by their norm and update the parameters; all ranks call.

    Args:
        optimizer: The optimizer, after `gradient_norm` was called for it.
        norm: Norm that `gradient_norm` returned.
    """
    for part in distributed_parts(optimizer):
        parameters = part.get_parameters()
        if part.config.clip_grad > 0.0 and parameters:
            clip_grad_by_total_norm_fp32(parameters, part.config.clip_grad, norm,
                                         use_decoupled_grad=_is_decoupled(part))
    is_applied = optimizer.step_with_ready_grads()
    assert is_applied, "without a gradient scaler every update is applied"


def _gradient(part: Any, parameter: torch.nn.Parameter) -> torch.Tensor | None:
    return getattr(parameter, "decoupled_grad", None) if _is_decoupled(part) else parameter.grad


def _is_decoupled(part: Any) -> bool:
    """Whether gradients wait beside the parameters, in a dtype of their own."""
    return bool(part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8)
