"""What is always there beside weights, gradients and optimizer: tables and counts."""

from __future__ import annotations

from collections.abc import Sequence

from dsv3_megatron.planning.memory_settings import INDEX, WIDE, PassSettings
from dsv3_megatron.planning.memory_stage import StageContent


def buffer_bytes(s: PassSettings, contents: Sequence[StageContent]) -> int:
    """Of a rank with these stages: rotary tables; routers' biases, loads and balance losses; a dispatcher's notes."""
    total = 0
    for content in contents:
        moe = content.num_moe + content.num_mtp * content.is_mtp_moe
        total += (content.num_dense + content.num_moe + content.num_mtp) * 2 * s.length * s.rope // 2 * WIDE
        total += moe * (s.experts * (WIDE + INDEX) + WIDE)
        if not (s.is_piped and s.has_remote_experts):
            # Megatron-Core's dispatcher keeps the last micro-batch's gates, choices and row numbers, the latter two as
            # views of what sorted them.
            total += moe * (s.local_tokens * s.experts * (WIDE + 1) + s.sent_rows * INDEX)
    return total
