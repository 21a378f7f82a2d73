"""An optimizer step in two halves, so that something can be decided between them: the norm, then the update.

Megatron-Core's optimizers do both in one `step()`, and in bf16 and fp32 they apply whatever gradient there is, NaN too.
These are its pieces in its order; nothing is computed twice, and a step that is applied gives the same bits. Without
Transformer Engine or apex its norm has the host read a number for each tensor; this one reads none.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.optimizer.optimizer import MegatronOptimizer

from dsv3_megatron.model.stage.buckets import buckets_of
from dsv3_megatron.optim.shards import distributed_parts


@torch.no_grad()
def squared_norm(optimizer: MegatronOptimizer) -> torch.Tensor:
    """Make the gradients ready for `apply_gradients`; the squared L2 norm of those that this rank counts.

    A fp32 number on the device, to be added up over all ranks; nothing is read. NaN or Inf anywhere makes the sum so,
    but for a rank's copy of a parameter that tensor-parallel ranks share: that counts once, and `nonfinite_copies`
    looks at the others. No parameter and no state of the optimizer changes.
    """
    if optimizer.prepare_grads():  # a gradient scaler, which neither bf16 nor fp32 has, found one that is not finite
        return torch.full((), math.nan, device=torch.cuda.current_device())
    gradients = [gradient for part in distributed_parts(optimizer) for gradient in part.get_grads_for_grad_norm()]
    if not gradients:
        return torch.zeros((), device=torch.cuda.current_device())
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))).square()


@torch.no_grad()
def nonfinite_copies(optimizer: MegatronOptimizer) -> torch.Tensor:
    """NaN if NaN or Inf is in those of this rank's gradients that the norm leaves out, else 0; after `squared_norm`.

    A number on the device, of which the sum over ranks says the same of all; nothing is read.
    """
    copies = []
    for part in distributed_parts(optimizer):
        counted = {gradient.data_ptr() for gradient in part.get_grads_for_grad_norm()}
        gradients = [_gradient(part, parameter) for parameter in part.get_parameters()]
        copies += [gradient for gradient in gradients
                   if gradient is not None and gradient.numel() and gradient.data_ptr() not in counted]
    if not copies:
        return torch.zeros((), device=torch.cuda.current_device())
    return torch.stack(torch._foreach_norm(copies, math.inf)).max() * 0


@torch.no_grad()
def apply_gradients(optimizer: MegatronOptimizer, norm: float) -> None:
    """Clip the gradients by their norm and update the parameters; all ranks call.

    Where weights are gathered late, only this rank's shards are new afterwards (`model/stage/buckets.py`).

    Args:
        optimizer: The optimizer, after `squared_norm` was called for it.
        norm: Root of the sum of all ranks' `squared_norm`.
    """
    for part in distributed_parts(optimizer):
        _clip(part, norm)
    is_applied = optimizer.step_with_ready_grads()
    assert is_applied, "without a gradient scaler every update is applied"
    chunks = {id(chunk): chunk for part in distributed_parts(optimizer) for chunk in part.model_chunks}
    for buckets in buckets_of(chunks.values()):
        buckets.note_update()


def _clip(part: Any, norm: float) -> None:
    """Scale a part's gradients down to the largest norm that its settings allow, as Megatron-Core does.

    In place: without Transformer Engine or apex Megatron-Core makes a scaled copy of each and copies it back.
    """
    largest = part.config.clip_grad
    # As Megatron-Core has it: a norm that is the largest one itself is scaled too.
    factor = largest / (norm + 1.0e-6) if largest > 0.0 else 1.0
    gradients = [gradient for gradient in (_gradient(part, parameter) for parameter in part.get_parameters())
                 if gradient is not None]
    if factor < 1.0 and gradients:
        torch._foreach_mul_(gradients, factor)


def _gradient(part: Any, parameter: torch.nn.Parameter) -> torch.Tensor | None:
    return getattr(parameter, "decoupled_grad", None) if _is_decoupled(part) else parameter.grad


def _is_decoupled(part: Any) -> bool:
    """Whether gradients wait beside the parameters, in a dtype of their own."""
    return bool(part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8)
