"""SwiGLU of which the input alone is kept, in FP8 or as it is: its output is made again from what is kept.

It works on some rows at a time: what is wide of [R, 2F] is not alive at once. That changes no bit: rows do not meet.

Shapes: R rows, F expert hidden.

Source: DeepSeek-V3 report, section 3.3.3: the inputs of SwiGLU are cached in FP8, and its output is recomputed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from dsv3_megatron.config.precision import LinearPrecision
from dsv3_megatron.ops.fp8.linear import Saved
from dsv3_megatron.ops.fp8.products import Products
from dsv3_megatron.ops.fp8.quantize import Quantized
from dsv3_megatron.ops.fp8.reference_backend import REFERENCE, ReferenceBackend
from dsv3_megatron.ops.recompute import recomputed, remembered, saving
from dsv3_megatron.ops.swiglu import swiglu, swiglu_backward, swiglu_forward

# Rows that are wide at a time.
CHUNK = 8192


def fp8_swiglu(x: torch.Tensor, precision: LinearPrecision, *, backend: ReferenceBackend = REFERENCE) -> torch.Tensor:
    """SwiGLU in front of a linear layer in FP8, differentiable; the layer need not keep what it gets.

    Args:
        x: [..., 2F], gate half first.
        precision: Precision of the layer that follows; its `cached_input` is the form in which x is kept.
        backend: Implementation of quantization.

    Returns:
        [..., F] in x's dtype. In backward, what the layer multiplies is made of the kept x.
    """
    if not torch.is_grad_enabled():
        return swiglu(x)
    rows = x.reshape(-1, x.shape[-1])
    kept = Products(precision, backend).cached(rows.detach(), rows.detach())
    if not isinstance(kept, Quantized):
        return recomputed(swiglu, x)
    form = (kept.group, kept.format, kept.shape)

    def again(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return activation(Quantized(values, scales, *form), None, x_dtype)

    x_dtype = x.dtype
    with saving():
        active = _KeptSwiGLU.apply(rows, kept)
    return remembered(active, again, kept.values, kept.scales).view(*x.shape[:-1], -1)


def activation(hidden_RF: torch.Tensor | Quantized, gates_R: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """SwiGLU [R, F] of its input [R, 2F] as that was kept, times gates, computed in fp32 and rounded to `dtype`."""
    rows, width = hidden_RF.shape
    active = torch.empty(rows, width // 2, dtype=dtype, device=_device(hidden_RF))
    for part, wide, gates in _chunks(hidden_RF, gates_R):
        active[part] = swiglu_forward(wide, gates)
    return active


class SwiGLUGradients(NamedTuple):
    """What goes back through SwiGLU.

    Attributes:
        hidden: Gradient of its input, [R, 2F].
        gates: fp32 gradient of the rows' gates, [R]; None without gates.
        active: SwiGLU's output again, [R, F]; None where it was not asked for.
    """

    hidden: torch.Tensor
    gates: torch.Tensor | None
    active: torch.Tensor | None


def swiglu_gradients(grad_RF: torch.Tensor, hidden_RF: torch.Tensor | Quantized, gates_R: torch.Tensor | None,
                     dtype: torch.dtype, *, needs_output: bool = False) -> SwiGLUGradients:
    """Go back through SwiGLU from its input as that was kept, in fp32.

    Args:
        grad_RF: Gradient of the output, [R, F].
        hidden_RF: Input [R, 2F].
        gates_R: Gate of each row; None is 1.
        dtype: Dtype of the results [R, 2F] and [R, F].
        needs_output: Give the output too.
    """
    rows, width = hidden_RF.shape
    grad_hidden = torch.empty(rows, width, dtype=dtype, device=grad_RF.device)
    grad_gates = None if gates_R is None else torch.empty(rows, dtype=torch.float32, device=grad_RF.device)
    active = torch.empty(rows, width // 2, dtype=dtype, device=grad_RF.device) if needs_output else None
    for part, wide, gates in _chunks(hidden_RF, gates_R):
        own, own_gates, output = swiglu_backward(grad_RF[part].float(), wide, gates, needs_output=needs_output)
        grad_hidden[part] = own
        if grad_gates is not None and own_gates is not None:
            grad_gates[part] = own_gates
        if active is not None and output is not None:
            active[part] = output
    return SwiGLUGradients(grad_hidden, grad_gates, active)


def _chunks(hidden: torch.Tensor | Quantized, gates: torch.Tensor | None
            ) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor | None]]:
    """Some rows at a time: which, in fp32, and their gates."""
    rows = hidden.shape[0]
    # Packed rows cannot be cut.
    size = CHUNK if not isinstance(hidden, Quantized) or hidden.format == "e4m3" else rows
    for start in range(0, rows, max(size, 1)):
        part = slice(start, min(start + size, rows))
        if isinstance(hidden, Quantized):
            wide = (hidden.rows(part) if size < rows else hidden).dequantize()
        else:
            wide = hidden[part].float()
        yield part, wide, None if gates is None else gates[part].float()


def _device(hidden: torch.Tensor | Quantized) -> torch.device:
    return hidden.values.device if isinstance(hidden, Quantized) else hidden.device


class _KeptSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, kept: Quantized) -> torch.Tensor:
        ctx.saved, ctx.dtype = Saved(ctx, kept), x.dtype
        with torch.no_grad():
            return swiglu(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        (kept,) = ctx.saved.load(ctx)
        return swiglu_gradients(grads[0], kept, None, ctx.dtype).hidden, None
