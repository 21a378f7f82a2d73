"""SwiGLU experts with their products in FP8, over rows sorted by expert.

Kept for backward are the input and the input of SwiGLU, both in FP8; SwiGLU's output is computed again. Per row of
DeepSeek-V3 (H 7168, 2F 4096) that is 11.6 KB instead of 22.5.

Shapes: R routed rows, e local experts, H hidden, F expert hidden.

Source: DeepSeek-V3 report, section 3.3.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from dsv3_megatron.config.precision import LinearPrecision
from dsv3_megatron.ops.fp8.kept_swiglu import activation, swiglu_gradients
from dsv3_megatron.ops.fp8.linear import Saved, settle_weight_grad
from dsv3_megatron.ops.fp8.products import Kept, Products
from dsv3_megatron.ops.fp8.reference_backend import REFERENCE, ReferenceBackend
from dsv3_megatron.ops.linear import WeightGradDeferral


def fp8_swiglu_experts(
    x_RH: torch.Tensor,
    counts: Sequence[int],
    fc1_eFH: torch.Tensor,
    fc2_eHF: torch.Tensor,
    gates_R: torch.Tensor | None,
    precisions: tuple[LinearPrecision, LinearPrecision],
    *,
    backend: ReferenceBackend = REFERENCE,
    accumulate_into_main_grad: bool = False,
    defer_weight_grad: WeightGradDeferral | None = None,
) -> torch.Tensor:
    """Apply to each row its expert, as `experts.swiglu_experts` does, in the precisions of the map.

    Args:
        x_RH: Rows sorted by expert, bf16 or fp32.
        counts: Rows of each expert; may be zero, sums to R.
        fc1_eFH: [e, 2F, H], gate rows first, then up rows.
        fc2_eHF: [e, H, F].
        gates_R: Router's weight of each row; multiplies the activation. None is 1.
        precisions: Precisions of fc1 and fc2; fc2's `cached_input` is the form in which SwiGLU's input is kept.
        backend: Implementation of quantization and products.
        accumulate_into_main_grad: Add the weight gradients to `main_grad`, as in `linear.linear`.
        defer_weight_grad: Gets one function for each of the two weights.

    Returns:
        [R, H] in x's dtype.

    Raises:
        ValueError: Counts that do not fit the rows or the weights.
    """
    counts = tuple(int(count) for count in counts)
    if len(counts) != fc1_eFH.shape[0] or sum(counts) != x_RH.shape[0] or min(counts, default=0) < 0:
        raise ValueError(
            f"fp8_swiglu_experts: counts={list(counts)} must have one entry for each of {fc1_eFH.shape[0]} experts and "
            f"sum to the {x_RH.shape[0]} rows; pass the rows sorted by local expert"
        )
    products = (Products(precisions[0], backend), Products(precisions[1], backend))
    return _Fp8Experts.apply(x_RH, gates_R, fc1_eFH, fc2_eHF, counts, products, accumulate_into_main_grad,
                             defer_weight_grad)


class _Fp8Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, gates: torch.Tensor | None, fc1: torch.Tensor, fc2: torch.Tensor,
                counts: tuple[int, ...], products: tuple[Products, Products], accumulate: bool,
                defer: WeightGradDeferral | None) -> torch.Tensor:
        first, second = products
        operand = first.operand(x)
        hidden = first.forward(operand, fc1, x.dtype, counts)
        active, cached_hidden = second.activated(hidden, gates)
        ctx.saved = Saved(ctx, first.cached(x, operand), cached_hidden, gates)
        ctx.weights, ctx.counts, ctx.products, ctx.dtype = (fc1, fc2), counts, products, x.dtype
        ctx.accumulate, ctx.defer = accumulate, defer
        return second.forward(active, fc2, x.dtype, counts)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        grad_y, counts, dtype = grads[0].contiguous(), ctx.counts, ctx.dtype
        first, second = ctx.products
        cached_x, cached_hidden, gates = ctx.saved.load(ctx)
        fc1, fc2 = ctx.weights
        grad_active = second.input_grad(grad_y, fc2, torch.float32, counts)
        grad_hidden, grad_gates, active = swiglu_gradients(grad_active, cached_hidden, gates, dtype,
                                                           needs_output=ctx.defer is None)
        del grad_active
        grad_x = first.input_grad(grad_hidden, fc1, dtype, counts) if ctx.needs_input_grad[0] else None
        kept_active: Kept = partial(activation, cached_hidden, gates, dtype) if active is None else active
        grad_weights = [
            settle_weight_grad(weight, products, grad, kept, ctx.accumulate, counts, ctx.defer) if needed else None
            for weight, products, grad, kept, needed in (
                (fc1, first, grad_hidden, cached_x, ctx.needs_input_grad[2]),
                (fc2, second, grad_y, kept_active, ctx.needs_input_grad[3]))]
        grad_gates = None if grad_gates is None or gates is None else grad_gates.to(gates.dtype)
        return grad_x, grad_gates, *grad_weights, None, None, None, None

