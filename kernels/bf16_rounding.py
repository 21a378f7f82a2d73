"""fp32 to the dtype of a result, to nearest even on a GPU and under Triton's interpreter alike.

The interpreter of Triton 3.9 cuts off what does not fit bf16. There EXACT_FIRST rounds in fp32 first, so that nothing
is left to cut off; the GPU's own conversion rounds to nearest even and needs no help.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def round_to(x, DTYPE: tl.constexpr, EXACT_FIRST: tl.constexpr):
    """fp32 values in DTYPE, bf16 or fp32; what is not finite stays so."""
    if EXACT_FIRST and DTYPE == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        x = tl.where(tl.abs(x) < float("inf"), nearest, x)
    return x.to(DTYPE)
