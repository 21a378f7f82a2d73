"""Head and loss by the kernels of `kernels/head_loss.py`, whose reference is `chunked_head_loss.py`.

Forward keeps nothing but what a token's loss is made of. Backward makes gradients of some columns of the logits at a
time (`head_loss_tiles.gradient_columns`) and multiplies them with the weight's rows and with the hidden states; so each
row of the weight's gradient is read and written once, and what lives beside are these columns in the model's dtype and
the hidden gradient in fp32. Kernels are tested under Triton's interpreter. On a GPU: not run.

Shapes: T tokens, H hidden, V vocabulary, v its part on this tensor-parallel rank.
"""

from __future__ import annotations

import torch

from dsv3_megatron.ops.linear import add_product_
from dsv3_megatron.ops.local_scores import LocalScores, is_among


def fused_scores(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> LocalScores:
    """Scores of each token over this rank's columns, without writing logits.

    Args:
        hidden: [T, H], bf16, fp16 or fp32.
        weight: [v, H], same dtype.
        targets: int64 [T], a row of `weight`, or anything else where the target is not among them.
    """
    from dsv3_megatron.kernels.head_loss import head_scores

    largest, sums, target_logits = head_scores(hidden, weight, targets)
    is_here = is_among(targets, weight.shape[0])
    return LocalScores(largest, sums, target_logits.sub_(largest).where(is_here, 0.0))


def fused_gradients(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, largest: torch.Tensor,
                    log_sums: torch.Tensor, grad_losses: torch.Tensor, main_grad: torch.Tensor | None, *,
                    needs_hidden: bool, needs_weight: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of the hidden states and of the weight; None where not needed, or where `main_grad` took it.

    Args:
        hidden: Hidden states [T, H].
        weight: This rank's rows of the head, [v, H].
        targets: Each token's target, counted from this rank's first row; int64 [T].
        largest: fp32 [T], over the columns of all ranks.
        log_sums: fp32 [T], log of the sum of exp(logit - largest) over the columns of all ranks.
        grad_losses: fp32 [T].
        main_grad: [v, H] to add the weight's gradient to, or None.
        needs_hidden: Whether the hidden gradient is wanted.
        needs_weight: Whether the weight's gradient is wanted.
    """
    from dsv3_megatron.kernels.head_loss import logit_gradients, tiles_here
    from dsv3_megatron.kernels.head_loss_tiles import gradient_columns

    (num_tokens, width), vocabulary = hidden.shape, weight.shape[0]
    columns = min(gradient_columns(vocabulary, width, tiles_here().block_v), vocabulary)
    buffer = hidden.new_empty(num_tokens * columns)
    grad_weight = torch.empty_like(weight) if needs_weight and main_grad is None else None
    # Rounded to the model's dtype at once where one product makes all of it.
    summed_dtype = hidden.dtype if columns == vocabulary else torch.float32
    summed = None
    for first in range(0, vocabulary, columns):
        rows = slice(first, min(first + columns, vocabulary))
        gradients = buffer[: num_tokens * (rows.stop - first)].view(num_tokens, rows.stop - first)
        logit_gradients(hidden, weight, targets, largest, log_sums, grad_losses, first, gradients)
        if summed is not None:
            _add(summed, gradients, weight[rows])
        elif needs_hidden:
            summed = _product(gradients, weight[rows], summed_dtype)
        if needs_weight and main_grad is not None:
            _add(main_grad[rows], gradients.t(), hidden)
        elif grad_weight is not None:
            torch.mm(gradients.t(), hidden, out=grad_weight[rows])
    return None if summed is None else summed.to(hidden.dtype), grad_weight


def _product(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if dtype == left.dtype or left.device.type == "cpu":
        return torch.mm(left.to(dtype), right.to(dtype))
    return torch.mm(left, right, out_dtype=dtype)


def _add(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += left @ right, summed in fp32 and rounded to the total's dtype alone."""
    if total.device.type == "cpu":  # under the interpreter; a CPU's library would round to the operands' dtype
        left, right = left.to(total.dtype), right.to(total.dtype)
    add_product_(total, left, right)
