"""RMSNorm over the last dimension: y = x / sqrt(mean(x^2) + eps) * weight.

Source: Zhang and Sennrich 2019, arXiv 1910.07467; DeepSeek-V3 report, section 4.2 (eps in the released config).

Computed in fp32 and rounded once, weight included (Transformers rounds before the weight). The "fused" backend keeps x
and one number a row; its backward makes 4 passes over memory.
"""

from __future__ import annotations

from typing import Any

import torch

from dsv3_megatron.ops.backend import log_choice, unknown_backend, wide_dtype

BACKENDS = ("auto", "fused", "native", "reference")


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, *, backend: str = "auto") -> torch.Tensor:
    """Normalise the last dimension by its root mean square, and multiply by a weight.

    Args:
        x: Values to normalise, [..., H].
        weight: Factor of each element, [H].
        eps: Added to the mean square.
        backend: "fused" (ours), "native" (torch's kernel) or "reference"; "auto" is fused on CPU, native elsewhere.

    Returns:
        [..., H] in x's dtype.

    Raises:
        ValueError: Unknown backend.
    """
    if backend not in BACKENDS:
        raise unknown_backend("rms_norm", backend, BACKENDS)
    if backend == "auto":
        backend = "fused" if x.device.type == "cpu" else "native"
        log_choice("rms_norm", backend, x.device.type)
    if backend == "fused":
        return _RMSNorm.apply(x, weight, eps) if torch.is_grad_enabled() else _fused(x, weight, eps)[0]
    if backend == "native":
        return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)
    return reference_rms_norm(x, weight, eps)


def reference_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """The formula, in fp32 or fp64."""
    wide = x.to(wide_dtype(x.dtype))
    return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps) * weight.to(wide.dtype)).to(x.dtype)


def _fused(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The result, and 1 / rms of each row [..., 1]."""
    wide = x.to(wide_dtype(x.dtype))
    inverse_rms = torch.linalg.vecdot(wide, wide).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)
    return (wide * inverse_rms).mul_(weight).to(x.dtype), inverse_rms


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        y, inverse_rms = _fused(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse_rms)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        # With n = x r, r = 1/rms: dx = r (g w - n mean(g w n)), dw = sum over rows of g n.
        x, weight, inverse_rms = ctx.saved_tensors
        wide = inverse_rms.dtype
        grad, normed = grads[0].to(wide), x.to(wide) * inverse_rms
        width = x.shape[-1]
        products = (grad * normed).view(-1, width)
        grad_weight = products.sum(dim=0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None
        share = torch.mv(products, weight.to(wide)).div_(width).view(inverse_rms.shape)
        grad_x = (grad * weight).sub_(normed.mul_(share)).mul_(inverse_rms)
        return grad_x.to(x.dtype), grad_weight, None
