"""y = x W^T with its products in FP8: the differentiable layer, and the tensors it keeps for backward.

The input is kept narrow: 1.03 bytes a value in E4M3, 1.53 in E5M6, instead of 2. Where it will be there in backward in
any case (`recompute.is_at_hand`: a norm's output that is computed again, a result that attention keeps), nothing is
kept, and the narrow copy is made again from it, with the same bits. The weight gradient is computed from it in fp32 and
added to `main_grad`, at once or deferred, as in `ops/linear.py`, whose protocol this follows. What has to wait for long
waits as Wgrad multiplies it, in FP8.

Source: DeepSeek-V3 report, section 3.3.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from dsv3_megatron.config.precision import LinearPrecision
from dsv3_megatron.ops.fp8.products import Kept, Products, WgradOperands
from dsv3_megatron.ops.fp8.quantize import Quantized
from dsv3_megatron.ops.fp8.reference_backend import REFERENCE, ReferenceBackend
from dsv3_megatron.ops.linear import (
    DeferredWeightGrad,
    WeightGradDeferral,
    add_to_grad,
    main_grad_of,
    mark_added_to_main_grad,
)
from dsv3_megatron.ops.recompute import is_at_hand, saving


def fp8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    precision: LinearPrecision,
    *,
    backend: ReferenceBackend = REFERENCE,
    accumulate_into_main_grad: bool = False,
    defer_weight_grad: WeightGradDeferral | None = None,
) -> torch.Tensor:
    """Differentiable y = x W^T in the precision that the map gives the layer.

    Args:
        x: [..., in], bf16 or fp32.
        weight: [out, in], same dtype.
        precision: Precision of each of the three products, and of what is kept.
        backend: Implementation of quantization and products.
        accumulate_into_main_grad: Add the weight gradient to `weight.main_grad`, as in `linear.linear`.
        defer_weight_grad: Gets the function that computes the weight gradient, as in `linear.linear`; what waits is the
            narrow input and the output gradient.

    Returns:
        [..., out] in x's dtype.
    """
    products = Products(precision, backend)
    if not torch.is_grad_enabled():
        rows = x.reshape(-1, x.shape[-1])
        y = products.forward(products.operand(rows), weight, x.dtype)
    else:
        with saving():
            y = _Fp8Linear.apply(x.reshape(-1, x.shape[-1]), weight, products, accumulate_into_main_grad,
                                 defer_weight_grad)
    return y.view(*x.shape[:-1], weight.shape[0])


class Saved:
    """Tensors and quantized tensors kept for backward, through autograd's own saved tensors."""

    def __init__(self, ctx: Any, *kept: torch.Tensor | Quantized | None) -> None:
        self.forms = [(k.group, k.format, k.shape) if isinstance(k, Quantized) else None for k in kept]
        tensors: list[torch.Tensor | None] = []
        for k in kept:
            tensors += (k.values, k.scales) if isinstance(k, Quantized) else (k,)
        ctx.save_for_backward(*tensors)

    def load(self, ctx: Any) -> list[Any]:
        """What was kept, in the same order."""
        tensors = iter(ctx.saved_tensors)
        return [next(tensors) if form is None else Quantized(next(tensors), next(tensors), *form)
                for form in self.forms]


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, products: Products, accumulate: bool,
                defer: WeightGradDeferral | None) -> torch.Tensor:
        operand = products.operand(x)
        ctx.is_made_again = is_at_hand(x)
        ctx.saved = Saved(ctx, x if ctx.is_made_again else products.cached(x, operand))
        # As an attribute: saved tensors may come back as other Python objects, without main_grad.
        ctx.weight, ctx.products, ctx.dtype = weight, products, x.dtype
        ctx.accumulate, ctx.defer = accumulate, defer
        return products.forward(operand, weight, x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        grad_y = grads[0].contiguous()
        (cached,) = ctx.saved.load(ctx)
        if ctx.is_made_again:
            cached = partial(ctx.products.cached_again, cached)
        grad_x = ctx.products.input_grad(grad_y, ctx.weight, ctx.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = settle_weight_grad(ctx.weight, ctx.products, grad_y, cached, ctx.accumulate, None, ctx.defer)
        return grad_x, grad_weight, None, None, None


def settle_weight_grad(weight: torch.Tensor, products: Products, grad_y: torch.Tensor, kept: Kept, accumulate: bool,
                       counts: Sequence[int] | None, defer: WeightGradDeferral | None) -> torch.Tensor | None:
    """Compute a weight's gradient, or hand its computation on.

    Args:
        weight: [O, I], or a stack with `counts`.
        products: The products of the weight.
        grad_y: Gradient of the output, [R, O].
        kept: The input [R, I] as it was kept, or what computes it.
        accumulate: Add to `weight.main_grad` where there is one.
        counts: Rows of each expert.
        defer: Gets the computation.

    Returns:
        For autograd: the gradient; None where `main_grad` took it or it is deferred.
    """
    wgrad = _WeightGrad(weight, products, accumulate)
    if defer is not None:
        defer(DeferredWeightGrad(_add_deferred, wgrad, grad_y, kept, counts, narrowed=_narrowed))
        return None
    grad = wgrad.compute(products.weight_grad_operands(grad_y, kept, counts))
    if grad is None:
        mark_added_to_main_grad(weight)
    return grad


class _WeightGrad(NamedTuple):
    """A weight whose gradient is wanted; its products; whether `main_grad` takes it where there is one."""

    weight: torch.Tensor
    products: Products
    accumulate: bool

    def compute(self, operands: Iterable[WgradOperands]) -> torch.Tensor | None:
        """The gradient in the weight's dtype, summed in fp32; None where `main_grad` took it."""
        weight = self.weight
        main_grad = main_grad_of(weight, self.accumulate)
        total = main_grad
        if total is None:
            total = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        self.products.add_weight_grads(operands, total)
        return None if main_grad is not None else total.to(weight.dtype)


def _add_deferred(wgrad: _WeightGrad, grad_y: torch.Tensor | None, kept: Kept | list[WgradOperands],
                  counts: Sequence[int] | None) -> None:
    if grad_y is None:
        assert isinstance(kept, list), "it was narrowed"
        operands: Iterable[WgradOperands] = kept
    else:
        assert not isinstance(kept, list), "it was not narrowed"
        operands = wgrad.products.weight_grad_operands(grad_y, kept, counts)
    add_to_grad(wgrad.weight, wgrad.compute(operands))


def _narrowed(wgrad: _WeightGrad, grad_y: torch.Tensor, kept: Kept, counts: Sequence[int] | None) -> tuple[Any, ...]:
    """What `_add_deferred` takes instead for a long wait: the operands as Wgrad multiplies them."""
    if wgrad.products.precision.wgrad != "fp8":
        return wgrad, grad_y, kept() if callable(kept) else kept, counts
    return wgrad, None, list(wgrad.products.weight_grad_operands(grad_y, kept, counts)), counts
