"""Latents that travel in FP8 between ranks that share a sequence: 656 bytes a token of DeepSeek-V3, of 1,152 in BF16.

A latent becomes E4M3 values with a scale for each 128 of them (`ops/fp8/packed_rows.py`). The rotated part of the key
behind it, which all heads share, stays as it is, as in FlashMLA's FP8 cache. A rank attends to its own block as the
others get it, so that what is computed does not depend on who has a token. The gradient is that of the rounded latents,
and comes home in the dtype of sums.

Source of the format: docs.vllm.ai, v1/attention/backends/mla/flashmla_sparse (0.11): 512 + 16 + 128 bytes.

Shapes: S sequence, B micro-batch, W what is passed of a position.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dsv3_megatron.ops.fp8.reference_backend import REFERENCE, ReferenceBackend
from dsv3_megatron.ops.row_bytes import record_bytes


@dataclass(frozen=True)
class NarrowLatents:
    """How what ranks pass each other becomes narrow, and is wide again.

    Attributes:
        width: Width of a latent, the first part of what is passed; what is behind it stays as it is.
        backend: Packs and unpacks.
    """

    width: int
    backend: ReferenceBackend = REFERENCE

    def packed(self, passed_SBW: torch.Tensor) -> torch.Tensor:
        """Bytes of what is passed, uint8 [S, B, bytes of a position]."""
        rows = passed_SBW.flatten(0, 1)
        kept = rows[:, self.width:].contiguous().view(torch.uint8)
        records = self.backend.pack_rows(rows[:, :self.width].contiguous(), spare=kept.shape[1])
        records[:, -kept.shape[1]:] = kept
        return records.unflatten(0, passed_SBW.shape[:2])

    def unpacked(self, records: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What was passed, [S, B, W] in the dtype that it was packed from."""
        rows = records.flatten(0, 1)
        kept = rows[:, record_bytes(self.width):].clone(memory_format=torch.contiguous_format).view(dtype)
        latents = self.backend.unpack_rows(rows, self.width, dtype)
        return torch.cat([latents, kept], dim=-1).unflatten(0, records.shape[:2])
