"""FP8 weights with one scale for each block of 128 x 128, DeepSeek-V3's published form: to it, and back.

A weight [out, in] is stored as E4M3 values and FP32 scales [ceil(out/128), ceil(in/128)]; what they stand for
is value * scale, in FP32. Blocks at the lower and right edge may be smaller. This is the reference: plain
torch, any device, some rows at a time so that the FP32 copy stays in a core's cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dsv3_megatron.ops.fp8.quantize import decode_e4m3
from dsv3_megatron.ops.fp8.scale_groups import BLOCK, E4M3_MAX, num_groups

# Elements that are in FP32 at a time.
_STRIP_ELEMENTS = 1 << 18
# Scales between which both the largest value (448 * scale) and the smallest (2^-9 * scale) are normal numbers of
# BF16, whose exponents are FP32's. Within them `requantize_weight_blocks` undoes `dequantize_weight_blocks`.
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-117, 2.0**118


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Shape of the scales of a weight of this shape."""
    rows, columns = shape
    return num_groups(rows), num_groups(columns)


def quantize_weight_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a weight to E4M3 with the scale amax / 448 of each block.

    An all-zero block gets the scale 1. A block whose amax / 448 is below the smallest normal FP32 number gets that.

    Args:
        weight: [out, in], floating point.

    Returns:
        values: float8_e4m3fn [out, in], weight / scale rounded to nearest even.
        scales: fp32 [ceil(out/128), ceil(in/128)].

    Raises:
        ValueError: a value is infinite or not a number.

    Source: DeepSeek-V3 report, section 3.3.2 (128 x 128 blocks, amax mapped to the largest E4M3 value).
    """
    scales = torch.empty(scale_shape(tuple(weight.shape)), dtype=torch.float32, device=weight.device)
    width = weight.shape[1]
    for block_row, scale in enumerate(scales):
        largest = torch.zeros(width, dtype=torch.float32, device=weight.device)
        for rows in _strips(tuple(weight.shape), block_row):
            torch.maximum(largest, weight[rows].float().abs().amax(dim=0), out=largest)
        amax = torch.nn.functional.pad(largest, (0, -width % BLOCK)).view(-1, BLOCK).amax(dim=1)
        if not torch.isfinite(amax).all():
            raise ValueError("a weight that is infinite or not a number has no FP8 form")
        smallest = (amax / E4M3_MAX).clamp_min(torch.finfo(torch.float32).tiny)
        scale.copy_(torch.where(amax == 0, torch.ones_like(smallest), smallest))
    return requantize_weight_blocks(weight, scales), scales


def requantize_weight_blocks(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Round a weight to E4M3 with given scales.

    Where the weight came from E4M3 values times these scales, in FP32 or rounded on to BF16, and the scales lie
    between SMALLEST_SCALE and LARGEST_SCALE, the values come back bit for bit: the rounding to BF16 moves a value by at
    most 2^-9 of it, and the middle between two neighbouring E4M3 values is at least 2^-5 of either away.

    Args:
        weight: [out, in], floating point.
        scales: fp32 [ceil(out/128), ceil(in/128)].

    Returns:
        float8_e4m3fn [out, in].
    """
    _check_scales(tuple(weight.shape), scales)
    values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    for block_row, scale in enumerate(scales):
        divisors = _of_columns(scale, weight.shape[1])
        for rows in _strips(tuple(weight.shape), block_row):
            values[rows] = torch.div(weight[rows].float(), divisors)
    return values


def dequantize_weight_blocks(values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.float32
                             ) -> torch.Tensor:
    """The weight that E4M3 values and their scales stand for: their FP32 product, rounded on to `dtype`.

    Args:
        values: float8_e4m3fn [out, in].
        scales: fp32 [ceil(out/128), ceil(in/128)], to multiply with although checkpoints call them `scale_inv`.
        dtype: Dtype of the result.

    Returns:
        [out, in].
    """
    _check_scales(tuple(values.shape), scales)
    weight = torch.empty(values.shape, dtype=dtype, device=values.device)
    for block_row, scale in enumerate(scales):
        factors = _of_columns(scale, values.shape[1])
        for rows in _strips(tuple(values.shape), block_row):
            weight[rows] = decode_e4m3(values[rows]).mul_(factors)
    return weight


def _check_scales(shape: tuple[int, ...], scales: torch.Tensor) -> None:
    if scales.dtype != torch.float32 or tuple(scales.shape) != scale_shape(shape):
        raise ValueError(f"scales of {scales.dtype} {tuple(scales.shape)} do not fit a weight of shape {shape}: "
                         f"it takes torch.float32 {scale_shape(shape)}")


def _of_columns(scale: torch.Tensor, width: int) -> torch.Tensor:
    """The scales of a row of blocks, one for each of `width` columns."""
    return scale.repeat_interleave(BLOCK)[:width]


def _strips(shape: tuple[int, ...], block_row: int) -> Iterator[slice]:
    """The rows of a row of blocks, so many at a time as stay in cache."""
    last = min(BLOCK * (block_row + 1), shape[0])
    step = max(1, _STRIP_ELEMENTS // max(1, shape[1]))
    for first in range(BLOCK * block_row, last, step):
        yield slice(first, min(first + step, last))
