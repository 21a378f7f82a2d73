"""What the tests of element-wise operations share: inputs, and an operation compared with its formula in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch

# bf16: inputs are exact, everything inside is fp32, so the result is off by its own rounding, 2^-9 relative; weight
# gradients likewise.
TOLERANCES = [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2**-8)]


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    """Normal numbers, the same for one seed in every dtype but for rounding."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_equals(function: Callable[..., torch.Tensor], reference: Callable[..., torch.Tensor],
                  inputs: list[torch.Tensor], dtype: torch.dtype, tolerance: float) -> None:
    """A function of inputs in a dtype equals its reference in float64, its gradients too."""
    inputs = [t.to(dtype) for t in inputs]
    results = []
    for call, is_wide in ((function, False), (reference, True)):
        leaves = [(t.double() if is_wide else t.clone()).requires_grad_() for t in inputs]
        out = call(*leaves)
        grad = randn(*out.shape, dtype=dtype, seed=3).to(out.dtype)
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    for got, expected in zip(*results, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
