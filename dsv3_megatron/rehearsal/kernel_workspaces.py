"""Memory that a kernel of torch takes for itself while it runs, which is in none of its results.

Only what is known from the kernel's source is here; a kernel that is not has none that is counted.
"""

from __future__ import annotations

import math
from typing import Any

# FlashAttention 2 rounds queries up to whole blocks.
_QUERY_BLOCK = 128


def workspace_bytes(operation: str, args: tuple[Any, ...]) -> int:
    """Bytes that an operation on a GPU takes beside its results.

    Source: torch's `aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp`, `mha_bwd`: the gradient of the
    queries is summed in fp32, and each query has a number.

    Args:
        operation: Name of one of torch's operations.
        args: Positional arguments; of attention the gradient of the output first, and then queries [B, N, S, D].
    """
    if operation != "_scaled_dot_product_flash_attention_backward":
        return 0
    batch, heads, length, width = args[1].shape
    rows = batch * heads * math.ceil(length / _QUERY_BLOCK) * _QUERY_BLOCK
    step = 32 if width <= 128 else 64
    return 4 * rows * (math.ceil(width / step) * step + 1)
