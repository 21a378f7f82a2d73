"""SwiGLU: silu(gate) * up, the two halves of one tensor, optionally times a weight per row.

Source: Shazeer 2020, arXiv 2002.05202. The row weight is the router's gate, which Megatron-Core multiplies onto the
activation before the second product (`permuted_probs`).

Only the input is kept for backward; the activation is recomputed there (cheaper than keeping it, and what the
DeepSeek-V3 report does, section 3.3.2).
"""

from __future__ import annotations

from typing import Any

import torch

from dsv3_megatron.ops.backend import wide_dtype


def swiglu(x: torch.Tensor, row_weights: torch.Tensor | None = None) -> torch.Tensor:
    """silu(x[..., :F]) * x[..., F:] * row_weights.

    Args:
        x: [..., 2F], gate half first.
        row_weights: [...], usually fp32; None is all ones.

    Returns:
        [..., F] in x's dtype, computed in fp32 and rounded once.

    Raises:
        ValueError: The last dimension is odd.
    """
    if x.shape[-1] % 2:
        raise ValueError(f"swiglu: last dimension {x.shape[-1]} must be even (gate half, up half); pass [gate; up]")
    return _SwiGLU.apply(x, row_weights) if torch.is_grad_enabled() else _rounded_swiglu(x, row_weights)


def reference_swiglu(x: torch.Tensor, row_weights: torch.Tensor | None = None) -> torch.Tensor:
    """The formula, in fp32 or fp64."""
    gate, up = x.to(wide_dtype(x.dtype)).chunk(2, dim=-1)
    out = gate * torch.sigmoid(gate) * up
    return (out if row_weights is None else out * row_weights.unsqueeze(-1)).to(x.dtype)


def swiglu_forward(x: torch.Tensor, row_weights: torch.Tensor | None) -> torch.Tensor:
    """SwiGLU of an fp32 or fp64 tensor [..., 2F], without autograd."""
    gate, up = x.chunk(2, dim=-1)
    out = torch.nn.functional.silu(gate).mul_(up)
    return out if row_weights is None else out.mul_(row_weights.unsqueeze(-1))


def swiglu_backward(
    grad: torch.Tensor, x: torch.Tensor, row_weights: torch.Tensor | None, *, needs_output: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of `swiglu_forward`, all tensors in one wide dtype.

    Returns:
        grad_x [..., 2F]; grad_row_weights [...] or None; the recomputed output [..., F], row weights applied, if asked.
    """
    gate, up = x.chunk(2, dim=-1)
    grad_x = torch.empty_like(x)
    grad_gate, grad_up = grad_x.chunk(2, dim=-1)
    silu = torch.nn.functional.silu(gate)
    grad_row_weights = output = None
    if row_weights is not None:
        output = silu * up
        grad_row_weights = torch.linalg.vecdot(grad, output)
        if needs_output:
            output.mul_(row_weights.unsqueeze(-1))
        grad = grad * row_weights.unsqueeze(-1)
    elif needs_output:
        output = silu * up
    torch.mul(grad, silu, out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
    return grad_x, grad_row_weights, output if needs_output else None


def _rounded_swiglu(x: torch.Tensor, row_weights: torch.Tensor | None) -> torch.Tensor:
    """SwiGLU computed in fp32 or fp64, in x's dtype."""
    wide = wide_dtype(x.dtype)
    return swiglu_forward(x.to(wide), None if row_weights is None else row_weights.to(wide)).to(x.dtype)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, row_weights: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, row_weights)
        return _rounded_swiglu(x, row_weights)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        x, row_weights = ctx.saved_tensors
        wide = wide_dtype(x.dtype)
        weights = None if row_weights is None else row_weights.to(wide)
        grad_x, grad_weights, _ = swiglu_backward(grads[0].to(wide), x.to(wide), weights)
        return grad_x.to(x.dtype), None if grad_weights is None else grad_weights.to(row_weights.dtype)
