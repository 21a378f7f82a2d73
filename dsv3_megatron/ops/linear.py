"""y = x W^T with its two gradients as functions of their own, so that each can be timed, deferred and accumulated.

The input gradient (dgrad) and the weight gradient (wgrad) are the backward-for-input and backward-for-weights of a
pipeline schedule that splits the backward pass. The weight gradient can go straight into the fp32 buffer `main_grad`
that Megatron-Core's DistributedDataParallel hangs on each parameter (its `gradient_accumulation_fusion`), which saves a
tensor, a pass and, where products are computed in fp32, a rounding to bf16.

The reference is `torch.nn.functional.linear`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from dsv3_megatron.ops.backend import choose_product_backend
from dsv3_megatron.ops.recompute import saving
from dsv3_megatron.ops.row_blocks import repeating_size, shapes_should_repeat

_FEW_ROWS = 8
# Parts of a weight's outputs, where their number can be divided so, when one row is multiplied by it.
_PARTS = 8
# Receives the computation of one weight gradient, to be called later.
WeightGradDeferral = Callable[[Callable[[], None]], None]


def linear_forward(x: torch.Tensor, weight: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """Multiply by a weight: y = x W^T.

    Args:
        x: [..., in], bf16, fp32 or fp64.
        weight: [out, in], same dtype.
        backend: "auto", "native" or "via_fp32", as `backend.choose_product_backend` takes it.

    Returns:
        [..., out] in x's dtype; products are summed in fp32 or better.
    """
    rows, wide_weight = _operands(x, weight, backend, x.dtype)
    product = multiply_rows(rows, wide_weight).to(x.dtype)
    # A view could not be changed in place by who gets it (Megatron-Core's cross-entropy does), this can.
    return torch.ops.aten._unsafe_view(product, [*x.shape[:-1], weight.shape[0]])


def multiply_rows(rows_RI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """rows weight^T, [R, O], for tensors of one dtype.

    Of a few rows, as decoding has them, a CPU's library reads the weight once in W x^T and several times in x W^T: the
    head of `laptop` (32000 x 512, fp32; CPU time of one thread of an AMD EPYC with AVX-512, MKL 2024.2) took 3.2 and
    13.7 ms for 2 rows, 5.9 and 11.4 for 4, 7.8 and 16.5 for 8. One row takes 6.1 ms either way, in MKL's matrix-vector
    product; as a batch of parts of the weight, each multiplied by the row as a matrix of one column, it takes 2.9.
    """
    num_rows = rows_RI.shape[0]
    if not 1 <= num_rows <= _FEW_ROWS or rows_RI.device.type != "cpu" or torch.is_grad_enabled():
        return torch.mm(rows_RI, weight_OI.t())
    if num_rows > 1:
        return torch.mm(weight_OI, rows_RI.t()).t().contiguous()
    num_outputs, num_inputs = weight_OI.shape
    parts = math.gcd(num_outputs, _PARTS)
    if parts == 1 or rows_RI.dtype != torch.float32:
        return torch.nn.functional.linear(rows_RI, weight_OI)
    # Strides of a transposed row: MKL takes 20 ms where they say that it is a column.
    column_PI1 = rows_RI.as_strided((parts, num_inputs, 1), (0, rows_RI.stride(1), num_inputs))
    return torch.bmm(weight_OI.view(parts, num_outputs // parts, num_inputs), column_PI1).view(1, num_outputs)


def linear_input_grad(
    grad_y: torch.Tensor, weight: torch.Tensor, *, dtype: torch.dtype | None = None, backend: str = "auto"
) -> torch.Tensor:
    """Compute the gradient of a linear's input: dx = dy W.

    Args:
        grad_y: [..., out]; may already be fp32 where the weight is bf16 ("via_fp32" only).
        weight: Weight of the linear, [out, in].
        dtype: Dtype of the result; the weight's by default.
        backend: "auto", "native" or "via_fp32", as `backend.choose_product_backend` takes it.

    Returns:
        [..., in].
    """
    rows, wide_weight = _operands(grad_y, weight, backend, weight.dtype)
    return torch.mm(rows, wide_weight).to(dtype or weight.dtype).view(*grad_y.shape[:-1], weight.shape[1])


def linear_weight_grad(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    *,
    main_grad: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor | None:
    """dW = dy^T x, returned in x's dtype or added to `main_grad`.

    Args:
        grad_y: [..., out]; may already be fp32 where x is bf16 ("via_fp32" only).
        x: Input of the linear, [..., in].
        main_grad: [out, in], usually fp32; when given the gradient is added to it.
        backend: "auto", "native" or "via_fp32", as `backend.choose_product_backend` takes it.

    Returns:
        [out, in], or None when `main_grad` took it.
    """
    wide_grad, rows = _operands(grad_y, x.reshape(-1, x.shape[-1]), backend, x.dtype)
    if main_grad is None:
        return torch.mm(wide_grad.t(), rows).to(x.dtype)
    add_product_(main_grad, wide_grad.t(), rows)
    return None


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    backend: str = "auto",
    accumulate_into_main_grad: bool = False,
    defer_weight_grad: WeightGradDeferral | None = None,
) -> torch.Tensor:
    """Differentiable y = x W^T.

    Args:
        x: Input of the linear, [..., in].
        weight: [out, in], same dtype.
        backend: "auto", "native" or "via_fp32", as `backend.choose_product_backend` takes it.
        accumulate_into_main_grad: Add the weight gradient to `weight.main_grad` where there is one, and set
            `weight.grad_added_to_main_grad`, which tells Megatron-Core's hooks that nothing is left to add. Autograd
            then gets no gradient. (Megatron-Core's fused path makes a dummy of the weight's size, for hooks that start
            a reduction when a gradient is there; those are off.)
        defer_weight_grad: Gets a function of no arguments that computes the weight gradient and adds it to
            `weight.main_grad` (or `weight.grad`); backward itself then computes the input gradient alone.

    Returns:
        [..., out].
    """
    if not torch.is_grad_enabled():
        return _of_repeating_shape(x, weight, backend)
    with saving():
        return _Linear.apply(x, weight, backend, accumulate_into_main_grad, defer_weight_grad)


def _of_repeating_shape(x: torch.Tensor, weight: torch.Tensor, backend: str) -> torch.Tensor:
    """`linear_forward`, where a narrow product is native on a CPU of more rows: zeros, up to one of a few numbers.

    Prompts of any length and last batches then find a kernel that is there (`row_blocks.py`). A training step's rows
    are always as many.
    """
    num_rows = math.prod(x.shape[:-1])
    is_native = choose_product_backend(backend, x.device, x.dtype) == "native"
    if num_rows <= _FEW_ROWS or not is_native or not shapes_should_repeat(x.device, x.dtype):
        return linear_forward(x, weight, backend=backend)
    missing = repeating_size(num_rows) - num_rows
    if not missing:
        return linear_forward(x, weight, backend=backend)
    rows = torch.nn.functional.pad(x.reshape(num_rows, -1), (0, 0, 0, missing))
    return linear_forward(rows, weight, backend=backend)[:num_rows].view(*x.shape[:-1], -1)


def main_grad_of(weight: torch.Tensor, accumulate: bool) -> torch.Tensor | None:
    """`weight.main_grad` where gradients are to be accumulated there and it exists."""
    return getattr(weight, "main_grad", None) if accumulate else None


def mark_added_to_main_grad(weight: torch.Tensor) -> None:
    """Record that `weight.main_grad` holds this gradient."""
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]


class DeferredWeightGrad:
    """A weight gradient that is computed when called, once, with what was held for it until then.

    Args:
        compute: Computes the gradient and adds it to the weight's.
        held: Arguments of `compute`; let go after it.
        narrowed: Makes of `held` other arguments of the same gradient that take less memory; None: there are none.
    """

    def __init__(self, compute: Callable[..., None], *held: Any,
                 narrowed: Callable[..., tuple[Any, ...]] | None = None) -> None:
        self.compute = compute
        self.held: tuple[Any, ...] | None = held
        self.narrowed = narrowed

    def narrow(self) -> None:
        """Take less memory until it is computed, where that is possible: for a long wait."""
        narrowed, self.narrowed = self.narrowed, None
        if narrowed is not None and self.held is not None:
            with torch.no_grad():
                self.held = narrowed(*self.held)

    def __call__(self) -> None:
        """Compute it; RuntimeError the second time."""
        if self.held is None:
            raise RuntimeError("a deferred weight gradient was computed twice; call each one once")
        held, self.held = self.held, None
        with torch.no_grad():
            self.compute(*held)


def add_to_grad(weight: torch.Tensor, grad: torch.Tensor | None) -> None:
    """Add a gradient computed outside autograd to `weight.grad`; None: `weight.main_grad` holds it already."""
    if grad is None:
        mark_added_to_main_grad(weight)
    elif weight.grad is None:
        weight.grad = grad
    else:
        weight.grad.add_(grad)


def add_product_(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += left @ right, in one call where the dtypes are equal, and on CUDA.

    There a narrow product is added to an fp32 total as it was summed, in fp32. A CPU's library has no such product: it
    is rounded to the operands' dtype first.
    """
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.device.type == "cuda":
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.add_(torch.mm(left, right))


def _operands(
    left: torch.Tensor, right: torch.Tensor, backend: str, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = left.reshape(-1, left.shape[-1])
    if choose_product_backend(backend, left.device, dtype) == "via_fp32":
        return rows.float(), right.float()
    return rows, right


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        backend: str,
        accumulate: bool,
        defer: WeightGradDeferral | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight = weight  # saved_tensors may hand back another Python object, without main_grad
        ctx.backend = choose_product_backend(backend, x.device, x.dtype)
        ctx.accumulate, ctx.defer = accumulate, defer
        return linear_forward(x, weight, backend=backend)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        grad_y = grads[0].float() if ctx.backend == "via_fp32" else grads[0]
        grad_x = linear_input_grad(grad_y, weight, backend=ctx.backend) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            if ctx.defer is None:
                grad_weight = _weight_grad_for_autograd(ctx.weight, grad_y, x, ctx.accumulate, ctx.backend)
            else:
                # Deferred gradients wait in memory: keep the narrow one.
                ctx.defer(DeferredWeightGrad(_add_deferred, ctx.weight, grads[0], x, ctx.accumulate, ctx.backend))
        return grad_x, grad_weight, None, None, None


def _add_deferred(
    weight: torch.Tensor, grad_y: torch.Tensor, x: torch.Tensor, accumulate: bool, backend: str
) -> None:
    main_grad = main_grad_of(weight, accumulate)
    add_to_grad(weight, linear_weight_grad(grad_y, x, main_grad=main_grad, backend=backend))


def _weight_grad_for_autograd(
    weight: torch.Tensor, grad_y: torch.Tensor, x: torch.Tensor, accumulate: bool, backend: str
) -> torch.Tensor | None:
    grad = linear_weight_grad(grad_y, x, main_grad=main_grad_of(weight, accumulate), backend=backend)
    if grad is None:
        mark_added_to_main_grad(weight)
    return grad
