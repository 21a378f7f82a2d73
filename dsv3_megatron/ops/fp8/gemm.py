"""Products of quantized matrices, and a model of how Hopper's tensor cores add up.

y[m, n] = sum over groups k of (sum over the group's 128 values of a * b) * scale_a[m, k] * scale_b[n, k]: the inner sum
is what a tensor core computes, the outer one the promotion to fp32 every 128 values of K, where the scales are applied.

Accumulation, the model of the inner sum:

    "fp32"          as exact as fp32 sums: both matrices are dequantized and multiplied in one call. What promotion
                    guards against does not exist then, and no difference but fp32's rounding is left of it.
    "fp22"          the accumulator has 13 fraction bits: after each instruction (32 values of K) it is cut off there,
                    towards zero. The instruction's own sum is in fp32.
    "fp22_aligned"  the instruction's 32 products and the accumulator are first aligned to the largest of them, and
                    everything below its 13th fraction bit is cut off. Slow: for studies.

Source: DeepSeek-V3 report, section 3.3.2 ("around 14 bits", promotion every 128); "Insights into DeepSeek-V3",
arXiv 2505.09343 (alignment, 13 fraction bits, truncation).
"""

from __future__ import annotations

import torch

from dsv3_megatron.ops.fp8.quantize import Quantized, decode_e4m3
from dsv3_megatron.ops.fp8.scale_groups import BLOCK, SQUARE, TILE

ACCUMULATIONS = ("fp32", "fp22", "fp22_aligned")
_INSTRUCTION_K = 32
_FRACTION_BITS = 13
# Products [rows, N, 32] that are aligned at a time.
_ALIGNED_ELEMENTS = 1 << 22


def block_gemm(
    a_MK: Quantized,
    b_NK: Quantized,
    *,
    dtype: torch.dtype = torch.float32,
    accumulation: str = "fp32",
    promotion: int | None = BLOCK,
) -> torch.Tensor:
    """a b^T of two E4M3 matrices.

    Args:
        a_MK: Left matrix, in tiles of 1x128 or in blocks of 128x128.
        b_NK: Right matrix, in tiles of 1x128 or in blocks of 128x128.
        dtype: Dtype of the result, which is rounded once from fp32.
        accumulation: "fp32", "fp22" or "fp22_aligned", see above.
        promotion: Values of K between two promotions, a multiple of 32 that divides 128; None: never, which needs
            matrices whose scales do not change along K. For "fp32" it changes nothing.

    Returns:
        [M, N].

    Raises:
        ValueError: Unknown accumulation, groups or widths that do not fit, or scales that change between promotions.
    """
    if accumulation not in ACCUMULATIONS:
        raise ValueError(f"accumulation={accumulation!r} of block_gemm must be one of {', '.join(ACCUMULATIONS)}")
    for name, matrix in (("a", a_MK), ("b", b_NK)):
        if matrix.format != "e4m3" or matrix.group not in (TILE, SQUARE):
            raise ValueError(f"block_gemm: {name} is {matrix.format} in groups of {matrix.group}; it takes e4m3 in "
                             f"{TILE} or {SQUARE}")
    if a_MK.shape[-1] != b_NK.shape[-1]:
        raise ValueError(f"block_gemm: a {a_MK.shape} and b {b_NK.shape} must have as many columns")
    if accumulation == "fp32":
        return torch.mm(a_MK.dequantize(), b_NK.dequantize().t()).to(dtype)
    return _promoted(a_MK, b_NK, accumulation, promotion).to(dtype)


def truncate_to_fp22(x: torch.Tensor) -> torch.Tensor:
    """fp32 cut off, towards zero, after 13 fraction bits; infinities and NaN stay."""
    bits = x.view(torch.int32) & ~((1 << (23 - _FRACTION_BITS)) - 1)
    return torch.where(torch.isfinite(x), bits.view(torch.float32), x)


def _promoted(a: Quantized, b: Quantized, accumulation: str, promotion: int | None) -> torch.Tensor:
    depth = a.shape[-1]
    interval = depth if promotion is None else promotion
    if promotion is None and max(a.scales.shape[-1], b.scales.shape[-1]) > 1:
        one_scale = (a.scales == a.scales[:, :1]).all() and (b.scales == b.scales[:, :1]).all()
        if not one_scale:
            raise ValueError("block_gemm: promotion=None needs scales that do not change along K; promote every 128")
    elif promotion is not None and (promotion % _INSTRUCTION_K or BLOCK % promotion):
        raise ValueError(f"block_gemm: promotion={promotion} must be a multiple of {_INSTRUCTION_K} that divides "
                         f"{BLOCK}; use 32, 64 or 128, or None for no promotion")
    a_values, b_values = decode_e4m3(a.values), decode_e4m3(b.values)
    a_scales, b_scales = _row_scales(a), _row_scales(b)
    step = _instruction if accumulation == "fp22" else _aligned_instruction
    total = torch.zeros(a.shape[0], b.shape[0], device=a_values.device)
    for start in range(0, depth, interval):
        end = min(start + interval, depth)
        accumulator = torch.zeros_like(total)
        for first in range(start, end, _INSTRUCTION_K):
            columns = slice(first, min(first + _INSTRUCTION_K, end))
            accumulator = step(accumulator, a_values[:, columns], b_values[:, columns])
        group = start // BLOCK
        accumulator.mul_(a_scales[:, group, None]).mul_(b_scales[None, :, group])
        total.add_(accumulator)
    return total


def _row_scales(matrix: Quantized) -> torch.Tensor:
    """Scales of each row, [M, ceil(K / 128)]."""
    return matrix.scales.repeat_interleave(matrix.group[0], dim=0)[: matrix.shape[0]]


def _instruction(accumulator: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return truncate_to_fp22(torch.addmm(accumulator, a, b.t()))


def _aligned_instruction(accumulator: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """One instruction with every addend cut off 13 bits below the largest one's leading bit.

    Products of E4M3 numbers are exact in fp32, and so is the sum of 33 addends of 14 bits each.
    """
    rows = max(1, _ALIGNED_ELEMENTS // (b.shape[0] * b.shape[1]))
    result = torch.empty_like(accumulator)
    for top in range(0, a.shape[0], rows):
        part = slice(top, top + rows)
        products = a[part, None, :] * b[None, :, :]
        old = accumulator[part]
        largest = torch.maximum(products.abs().amax(dim=-1), old.abs())
        quantum = torch.ldexp(torch.ones_like(largest), torch.frexp(largest)[1] - 1 - _FRACTION_BITS)
        aligned = products.div_(quantum.unsqueeze(-1)).trunc_().sum(dim=-1)
        result[part] = truncate_to_fp22((aligned + (old / quantum).trunc()) * quantum)
    return result
