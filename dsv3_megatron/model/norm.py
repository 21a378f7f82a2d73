"""RMSNorm that works under sequence parallelism.

Megatron-Core's torch fallback refuses sequence parallelism; a norm there needs only to say that its
weight's gradient is partial on each tensor-parallel rank.
"""

from __future__ import annotations

from functools import partial

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from dsv3_megatron.ops.recompute import recomputed
from dsv3_megatron.ops.rms_norm import rms_norm


class RMSNorm(torch.nn.Module):
    """x / rms(x) * weight over the last dimension; statistics in fp32, result in x's dtype.

    Attributes:
        is_recomputed: Operations need not keep the result for backward.
    """

    is_recomputed = False

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        # The CPU in a run without CUDA (platform/cpu.py), and meta inside platform.meta_device().
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device()))
        # Each tensor-parallel rank sees a part of the sequence. Megatron-Core adds up, over these ranks, the gradients
        # of parameters with this mark.
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)

    def forward(self, x_SBH: torch.Tensor) -> torch.Tensor:
        """Normalise [..., hidden_size] over its last axis, and multiply by the weight."""
        if self.is_recomputed:
            return recomputed(partial(rms_norm, eps=self.eps), x_SBH, self.weight)
        return rms_norm(x_SBH, self.weight, self.eps)
