"""Random gradients for the tests of optimizers."""

from __future__ import annotations

import torch

FP32, BF16 = torch.float32, torch.bfloat16


def gradients(count: int, size: int, scale: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(size, generator=generator) * scale for _ in range(count)]
