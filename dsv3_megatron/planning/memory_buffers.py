"""What is always there beside weights, gradients and optimizer: tables and counts."""

from __future__ import annotations

from collections.abc import Sequence

from dsv3_megatron.planning.memory_settings import INDEX, WIDE, PassSettings
from dsv3_megatron.planning.memory_stage import StageContent


def buffer_bytes(s: PassSettings, contents: Sequence[StageContent]) -> int:
    """Of a rank with these stages: rotary tables; routers' biases, loads and balance losses."""
    total = 0
    for content in contents:
        moe = content.num_moe + content.num_mtp * content.is_mtp_moe
        total += (content.num_dense + content.num_moe + content.num_mtp) * 2 * s.length * s.rope // 2 * WIDE
        total += moe * (s.experts * (WIDE + INDEX) + WIDE)
    return total
