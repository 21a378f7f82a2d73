"""SwiGLU experts over rows sorted by expert: up to three products for each expert, no dropping.

On CPU the "looped" backend runs an ordinary product per expert into one output, with the activation while its operands
are in cache, everything between the input and the output in fp32. Narrow products there take some rows more than an
expert has, so that their shapes repeat (`row_blocks.py`). On CUDA in bf16 the "grouped_mm" backend runs all experts in
one grouped product each (not measured there).

Shapes: R routed rows, e local experts, H hidden, F expert hidden.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from dsv3_megatron.ops.backend import (
    PRODUCT_BACKENDS,
    choose_product_backend,
    log_choice,
    unknown_backend,
    wide_dtype,
)
from dsv3_megatron.ops.linear import (
    DeferredWeightGrad,
    WeightGradDeferral,
    add_product_,
    add_to_grad,
    main_grad_of,
    mark_added_to_main_grad,
    multiply_rows,
)
from dsv3_megatron.ops.recompute import recomputed, saving
from dsv3_megatron.ops.row_blocks import RowBlock, row_blocks, shapes_should_repeat
from dsv3_megatron.ops.swiglu import swiglu, swiglu_backward, swiglu_forward
from dsv3_megatron.platform.sending import send_integers

BACKENDS = ("auto", "looped", "grouped_mm", "reference")
# Without gradients the experts of up to this many rows are multiplied as decoding's are (`linear.multiply_rows`).
_FEW_ROWS = 64
# Without gradients the activation of all rows is computed at once where its input takes up to this many bytes.
_ACTIVATION_BYTES = 2 << 20


def swiglu_experts(
    x_RH: torch.Tensor,
    counts: Sequence[int],
    fc1_eFH: torch.Tensor,
    fc2_eHF: torch.Tensor,
    gates_R: torch.Tensor | None = None,
    *,
    backend: str = "auto",
    product_backend: str = "auto",
    accumulate_into_main_grad: bool = False,
    is_activation_recomputed: bool = False,
    least_rows: int = 1,
    defer_weight_grad: WeightGradDeferral | None = None,
) -> torch.Tensor:
    """Apply to each row its expert: fc2 (gate * silu(gate half of fc1 x) * (up half of fc1 x)).

    Args:
        x_RH: Rows sorted by expert, bf16, fp32 or fp64.
        counts: Rows of each expert; may be zero, sums to R.
        fc1_eFH: [e, 2F, H], gate rows first, then up rows.
        fc2_eHF: [e, H, F].
        gates_R: Router's weight of each row, usually fp32; multiplies the activation, as in Megatron-Core. None is 1.
        backend: "looped", "grouped_mm" or "reference"; "auto" is grouped_mm for bf16 on CUDA, looped elsewhere.
        product_backend: "auto", "native" or "via_fp32" for the looped products, as `backend.choose_product_backend`
            takes it.
        accumulate_into_main_grad: Add the weight gradients to `main_grad`, as in `linear.linear`; "looped" and
            "grouped_mm" only.
        is_activation_recomputed: Keep the activation's input alone for backward, as "looped" always does.
        least_rows: Rows that a product of "looped" takes at least, in fp32: of those behind an expert's, or zeros.
            With `steady_sums.LEAST_ROWS` a row's result has the same bits whatever rows there are beside it.
        defer_weight_grad: Gets the functions that compute the weight gradients, as in `linear.linear`; "looped" and
            "grouped_mm" only. The activation and the gradient of fc1's output wait with the input and the gradient of
            the output.

    Returns:
        [R, H] in x's dtype.

    Raises:
        ValueError: Unknown backend, counts that do not fit the rows or the weights, or accumulation into `main_grad`
            or deferral asked of a backend that has none.

    Source: DeepSeek-V3 report, eq. 12.
    """
    counts = tuple(int(count) for count in counts)
    if backend not in BACKENDS:
        raise unknown_backend("swiglu_experts", backend, BACKENDS)
    if product_backend not in PRODUCT_BACKENDS:
        raise unknown_backend("swiglu_experts products", product_backend, PRODUCT_BACKENDS)
    if len(counts) != fc1_eFH.shape[0] or sum(counts) != x_RH.shape[0] or min(counts, default=0) < 0:
        raise ValueError(
            f"swiglu_experts: counts={list(counts)} must have one entry for each of {fc1_eFH.shape[0]} experts and "
            f"sum to the {x_RH.shape[0]} rows; pass the rows sorted by local expert"
        )
    if backend == "auto":
        grouped = x_RH.device.type == "cuda" and x_RH.dtype == torch.bfloat16
        backend = "grouped_mm" if grouped else "looped"
        log_choice("swiglu_experts", backend, f"{x_RH.device.type}, {x_RH.dtype}")
    may_be_few = least_rows == 1 or shapes_should_repeat(x_RH.device, _product_dtype(x_RH, product_backend))
    if backend == "looped" and not torch.is_grad_enabled() and 1 <= x_RH.shape[0] <= _FEW_ROWS and may_be_few:
        runs = [(expert, count) for expert, count in enumerate(counts) if count]
        return few_rows_experts(x_RH, runs, fc1_eFH, fc2_eHF, gates_R, product_backend=product_backend)
    if backend == "looped" and not torch.is_grad_enabled():
        return _without_gradients(x_RH, counts, fc1_eFH, fc2_eHF, gates_R, product_backend, least_rows)
    if backend == "looped":
        plan = (counts, product_backend, accumulate_into_main_grad, defer_weight_grad, least_rows)
        with saving():
            return _LoopedExperts.apply(x_RH, gates_R, fc1_eFH, fc2_eHF, plan)
    if backend == "grouped_mm":
        return _grouped_mm(x_RH, counts, fc1_eFH, fc2_eHF, gates_R,
                           _WeightGrads(accumulate_into_main_grad, defer_weight_grad), is_activation_recomputed)
    for asked, name in ((accumulate_into_main_grad, "accumulate_into_main_grad=True"),
                        (defer_weight_grad is not None, "defer_weight_grad")):
        if asked:
            raise ValueError(f"{name} needs backend 'looped' or 'grouped_mm', not 'reference'; use one or 'auto'")
    return reference_experts(x_RH, counts, fc1_eFH, fc2_eHF, gates_R)


def _product_dtype(x: torch.Tensor, product_backend: str) -> torch.dtype:
    """Dtype of the operands of "looped" products."""
    via_fp32 = choose_product_backend(product_backend, x.device, x.dtype) == "via_fp32"
    return torch.float32 if via_fp32 else x.dtype


def reference_experts(
    x_RH: torch.Tensor,
    counts: Sequence[int],
    fc1_eFH: torch.Tensor,
    fc2_eHF: torch.Tensor,
    gates_R: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute `swiglu_experts` row by row, each with a copy of its expert's weights, in fp32 or fp64."""
    wide = wide_dtype(x_RH.dtype)
    expert_R = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(x_RH.device)
    gate, up = torch.einsum("rh,rfh->rf", x_RH.to(wide), fc1_eFH[expert_R].to(wide)).chunk(2, dim=-1)
    hidden = gate * torch.sigmoid(gate) * up
    if gates_R is not None:
        hidden = hidden * gates_R.unsqueeze(-1)
    return torch.einsum("rf,rhf->rh", hidden, fc2_eHF[expert_R].to(wide)).to(x_RH.dtype)


def _grouped_mm(
    x_RH: torch.Tensor,
    counts: tuple[int, ...],
    fc1_eFH: torch.Tensor,
    fc2_eHF: torch.Tensor,
    gates_R: torch.Tensor | None,
    weight_grads: _WeightGrads,
    is_recomputed: bool,
) -> torch.Tensor:
    ends = send_integers(list(itertools.accumulate(counts)), x_RH.device)

    def product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        with saving():
            return _GroupedProduct.apply(rows, weight, counts, ends, weight_grads)

    gates = () if gates_R is None else (gates_R,)
    hidden = product(x_RH, fc1_eFH)
    return product(recomputed(swiglu, hidden, *gates) if is_recomputed else swiglu(hidden, *gates), fc2_eHF)


class _WeightGrads(NamedTuple):
    """Destination of the weight gradients of grouped products: `main_grad` or autograd; and who computes them later."""

    accumulate: bool
    defer: WeightGradDeferral | None


class _GroupedProduct(torch.autograd.Function):
    """rows weight[e]^T of each expert's rows, in grouped products but for gradients that are added to `main_grad`."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight: torch.Tensor, counts: tuple[int, ...], ends: torch.Tensor,
                weight_grads: _WeightGrads) -> torch.Tensor:
        ctx.save_for_backward(rows, weight, ends)
        ctx.weight, ctx.counts, ctx.weight_grads = weight, counts, weight_grads
        return torch.nn.functional.grouped_mm(rows, weight.transpose(1, 2), offs=ends)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        rows, weight, ends = ctx.saved_tensors
        grad_y, (accumulate, defer), grad_weight = grads[0].contiguous(), ctx.weight_grads, None
        if ctx.needs_input_grad[1]:
            main_grad = main_grad_of(ctx.weight, accumulate)
            if defer is not None:
                defer(DeferredWeightGrad(_add_grouped, ctx.weight, main_grad, grad_y, rows, ctx.counts, ends))
            else:
                grad_weight = _grouped_weight_grad(main_grad, grad_y, rows, ctx.counts, ends)
                if grad_weight is None:
                    mark_added_to_main_grad(ctx.weight)
        grad_x = torch.nn.functional.grouped_mm(grad_y, weight, offs=ends) if ctx.needs_input_grad[0] else None
        return grad_x, grad_weight, None, None, None


def _add_grouped(weight: torch.Tensor, *rest: Any) -> None:
    add_to_grad(weight, _grouped_weight_grad(*rest))


def _grouped_weight_grad(main_grad: torch.Tensor | None, grad_y: torch.Tensor, rows: torch.Tensor,
                         counts: tuple[int, ...], ends: torch.Tensor) -> torch.Tensor | None:
    """The gradient of a stacked weight in its dtype; None where `main_grad` took it.

    A grouped product cannot be added to what is there, and has no sum in fp32 before torch's newest versions: into
    `main_grad` go the products of one expert after the other, not rounded before.
    """
    if main_grad is None:
        return torch.nn.functional.grouped_mm(grad_y.t(), rows, offs=ends)
    for expert, part in _row_ranges(counts):
        add_product_(main_grad[expert], grad_y[part].t(), rows[part])
    return None


def _row_ranges(counts: tuple[int, ...]) -> list[tuple[int, slice]]:
    """(expert, its rows) of every expert that has rows."""
    ranges, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            ranges.append((expert, slice(start, start + count)))
        start += count
    return ranges


def few_rows_experts(
    x_RH: torch.Tensor,
    runs: Sequence[tuple[int, int]],
    fc1_eFH: torch.Tensor | Sequence[torch.Tensor],
    fc2_eHF: torch.Tensor | Sequence[torch.Tensor],
    gates_R: torch.Tensor | None = None,
    *,
    product_backend: str = "auto",
) -> torch.Tensor:
    """`swiglu_experts` without gradients, with one activation for all rows: of a few it costs less than calls do.

    Args:
        x_RH: Rows, at least one; those of an expert behind each other.
        runs: Expert and number of rows, none 0, in the order of the rows; sums to R.
        fc1_eFH: [e, 2F, H], or each expert's [2F, H]; gate rows first, then up rows.
        fc2_eHF: [e, H, F], or each expert's.
        gates_R: Router's weight of each row; None is 1.
        product_backend: "auto", "native" or "via_fp32", as `backend.choose_product_backend` takes it.

    Returns:
        [R, H] in x's dtype.
    """
    via_fp32 = choose_product_backend(product_backend, x_RH.device, x_RH.dtype) == "via_fp32"
    dtype = torch.float32 if via_fp32 else x_RH.dtype
    counts = [count for _expert, count in runs]

    def products(rows: torch.Tensor, weights: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
        parts = []
        for (expert, _count), part in zip(runs, rows.split(counts), strict=True):
            weight = weights[expert]
            parts.append(multiply_rows(part, weight.to(dtype) if via_fp32 else weight))
        return torch.cat(parts)

    return products(swiglu(products(x_RH.to(dtype), fc1_eFH), gates_R), fc2_eHF).to(x_RH.dtype)


def _without_gradients(x: torch.Tensor, counts: tuple[int, ...], fc1: torch.Tensor, fc2: torch.Tensor,
                       gates: torch.Tensor | None, product_backend: str, least_rows: int) -> torch.Tensor:
    """What `_LoopedExperts` computes, to the bit, with one activation for all rows where that stays in cache."""
    dtype, wide = _product_dtype(x, product_backend), wide_dtype(x.dtype)
    rows_x, gates = x.to(dtype), None if gates is None else gates.to(wide)
    fc1_each, fc2_each = fc1.unbind(), fc2.unbind()
    fc1_out = torch.empty((x.shape[0], fc1.shape[1]), dtype=dtype, device=x.device)
    y = torch.empty((x.shape[0], fc2.shape[1]), dtype=dtype, device=x.device)
    blocks = list(row_blocks(counts, x.shape[0], x.device, dtype, least_rows))
    is_at_once = fc1_out.numel() * wide.itemsize <= _ACTIVATION_BYTES
    for block in blocks:
        hidden = block.multiply(block.of(rows_x), fc1_each[block.expert].to(dtype).t(), fc1_out)
        if not is_at_once:
            active = swiglu_forward(hidden.to(wide), None if gates is None else block.of(gates))
            block.multiply(active.to(dtype), fc2_each[block.expert].to(dtype).t(), y)
    if is_at_once:
        active = swiglu_forward(fc1_out.to(wide), gates).to(dtype)
        for block in blocks:
            block.multiply(block.of(active), fc2_each[block.expert].to(dtype).t(), y)
    return y.to(x.dtype)


class _LoopedExperts(torch.autograd.Function):
    """One product per expert. Keeps the input and, in the products' dtype, the output of fc1."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        gates: torch.Tensor | None,
        fc1: torch.Tensor,
        fc2: torch.Tensor,
        plan: tuple[tuple[int, ...], str, bool, WeightGradDeferral | None, int],
    ) -> torch.Tensor:
        counts, product_backend, ctx.accumulate, ctx.defer, least_rows = plan
        ctx.dtype = _product_dtype(x, product_backend)
        wide = wide_dtype(x.dtype)
        rows_x = x.to(ctx.dtype)
        gates_wide = None if gates is None else gates.to(wide)
        fc1_out = torch.empty((x.shape[0], fc1.shape[1]), dtype=ctx.dtype, device=x.device)
        y = torch.empty((x.shape[0], fc2.shape[1]), dtype=ctx.dtype, device=x.device)
        for block in row_blocks(counts, x.shape[0], x.device, ctx.dtype, least_rows):
            hidden = block.multiply(block.of(rows_x), fc1[block.expert].to(ctx.dtype).t(), fc1_out)
            active = swiglu_forward(hidden.to(wide), None if gates_wide is None else block.of(gates_wide))
            block.multiply(active.to(ctx.dtype), fc2[block.expert].to(ctx.dtype).t(), y)
        ctx.save_for_backward(x, gates, fc1, fc2, fc1_out)
        ctx.counts, ctx.weights = counts, (fc1, fc2)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        x, gates, fc1, fc2, fc1_out = ctx.saved_tensors
        dtype, wide = ctx.dtype, wide_dtype(x.dtype)
        grad_y, rows_x = grads[0].to(dtype), x.to(dtype)
        gates_wide = None if gates is None else gates.to(wide)
        grad_x = torch.empty_like(rows_x)
        grad_gates = None if gates_wide is None else torch.zeros_like(gates_wide)
        sink = _WaitingRows(fc1_out) if ctx.defer is not None else _WeightTotals(ctx.weights, ctx.accumulate, dtype)
        for block in row_blocks(ctx.counts, x.shape[0], x.device, dtype):
            grad_rows = block.of(grad_y)
            grad_active = torch.mm(grad_rows, fc2[block.expert].to(dtype)).to(wide)
            row_gates = None if gates_wide is None else block.of(gates_wide)
            grad_hidden, grad_row_gates, active = swiglu_backward(
                grad_active, block.of(fc1_out).to(wide), row_gates, needs_output=True
            )
            assert active is not None, "asked for"
            if grad_gates is not None and grad_row_gates is not None:
                grad_gates[block.rows] = grad_row_gates[: block.count]
            grad_hidden, active = block.with_zeros_(grad_hidden.to(dtype)), block.with_zeros_(active.to(dtype))
            sink.add(block, grad_rows, active, grad_hidden, rows_x)
            block.multiply(grad_hidden, fc1[block.expert].to(dtype), grad_x)
        grad_weights: tuple[torch.Tensor | None, ...] = (None, None)
        if isinstance(sink, _WeightTotals):
            grad_weights = sink.for_autograd()
        else:
            # Deferred gradients wait in memory: keep the narrow input and gradient.
            held = (ctx.weights, ctx.counts, ctx.accumulate, grads[0], x, sink.active, sink.grad_hidden)
            ctx.defer(DeferredWeightGrad(_add_waiting, *held))
        grad_gates = None if grad_gates is None or gates is None else grad_gates.to(gates.dtype)
        return grad_x.to(x.dtype), grad_gates, *grad_weights, None


class _WeightTotals:
    """Gradients of both stacked weights: their `main_grad`, or tensors of their own with zeros where no row came."""

    def __init__(self, weights: tuple[torch.Tensor, torch.Tensor], accumulate: bool, dtype: torch.dtype) -> None:
        self.fc1, self.fc2 = (_WeightTotal(weight, accumulate, dtype) for weight in weights)

    def add(self, block: RowBlock, grad_rows: torch.Tensor, active: torch.Tensor, grad_hidden: torch.Tensor,
            x: torch.Tensor) -> None:
        """One block's share; `active` and `grad_hidden` are zero behind its rows, `x` has the rows of all."""
        self.fc2.add(block.expert, grad_rows.t(), active)
        self.fc1.add(block.expert, grad_hidden.t(), block.of(x))

    def for_autograd(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return self.fc1.for_autograd(), self.fc2.for_autograd()


class _WaitingRows:
    """What the weight gradients will be made of besides the input and the gradient of the output."""

    def __init__(self, fc1_out: torch.Tensor) -> None:
        self.active = fc1_out.new_empty((fc1_out.shape[0], fc1_out.shape[1] // 2))
        self.grad_hidden = torch.empty_like(fc1_out)

    def add(self, block: RowBlock, _grad_rows: torch.Tensor, active: torch.Tensor, grad_hidden: torch.Tensor,
            _x: torch.Tensor) -> None:
        self.active[block.rows] = active[: block.count]
        self.grad_hidden[block.rows] = grad_hidden[: block.count]


def _add_waiting(
    weights: tuple[torch.Tensor, torch.Tensor], counts: tuple[int, ...], accumulate: bool, grad_y: torch.Tensor,
    x: torch.Tensor, active: torch.Tensor, grad_hidden: torch.Tensor
) -> None:
    dtype = active.dtype
    totals = _WeightTotals(weights, accumulate, dtype)
    grad_y, x = grad_y.to(dtype), x.to(dtype)
    for block in row_blocks(counts, x.shape[0], x.device, dtype):
        totals.add(block, block.of(grad_y), block.padded(active), block.padded(grad_hidden), x)
    for total in (totals.fc1, totals.fc2):
        add_to_grad(total.weight, total.own)


class _WeightTotal:
    """Gradient of a stacked weight: its `main_grad`, or a tensor of its own with zeros where no row came."""

    def __init__(self, weight: torch.Tensor, accumulate: bool, dtype: torch.dtype):
        self.weight = weight
        self.main_grad = main_grad_of(weight, accumulate)
        self.own = None if self.main_grad is not None else torch.zeros_like(weight)
        self.dtype = dtype

    def add(self, expert: int, left: torch.Tensor, right: torch.Tensor) -> None:
        if self.main_grad is not None:
            add_product_(self.main_grad[expert], left, right)
        elif self.own is not None and self.own.dtype == left.dtype:
            torch.mm(left, right, out=self.own[expert])
        elif self.own is not None:
            self.own[expert] = torch.mm(left, right)

    def for_autograd(self) -> torch.Tensor | None:
        if self.own is None:
            mark_added_to_main_grad(self.weight)
        return self.own
