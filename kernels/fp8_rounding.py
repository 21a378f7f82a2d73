"""The pieces that every FP8 kernel here shares: scales from magnitudes, rounding to E4M3, and E5M6 in 12 bits.

Triton's interpreter does not round to E4M3 as a GPU does. There EXACT_FIRST rounds to E4M3's grid in fp32, so that the
cast after it has nothing left to decide; the GPU's own conversion rounds to nearest even and needs no help.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scale_of(amax, is_finite, POWER_OF_2: tl.constexpr, LARGEST: tl.constexpr = 448.0):
    """amax / 448, at least 2^-126; 1 for zero; NaN where a value was not finite; rounded up to a power of two if asked.
    LARGEST is the format's largest number, 448 in E4M3.

    The reference is `ops/fp8_quantize.group_scales`.
    """
    scale = tl.maximum(tl.div_rn(amax, LARGEST), 1.1754943508222875e-38)
    if POWER_OF_2:
        bits = scale.to(tl.int32, bitcast=True)
        scale = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    scale = tl.where(amax == 0.0, 1.0, scale)
    return tl.where(is_finite, scale, float("nan"))


@triton.jit
def to_e4m3(x, EXACT_FIRST: tl.constexpr):
    """fp32 within +-448 (or NaN) to E4M3, to nearest even."""
    if EXACT_FIRST:
        # Three mantissa bits are what is left of x beside 1.5 * 2^(e + 20); below 2^-6 the step stays 2^-9.
        exponent = tl.maximum(x.to(tl.int32, bitcast=True) & 0x7F800000, 121 << 23)
        anchor = (exponent + (20 << 23)).to(tl.float32, bitcast=True) * 1.5
        x = (x + anchor) - anchor
    return x.to(tl.float8e4nv)


@triton.jit
def quantize_rows(x, POWER_OF_2: tl.constexpr, EXACT_FIRST: tl.constexpr):
    """A block [rows, 128] with a scale for each row: E4M3 values and fp32 scales [rows]."""
    scale = row_scales(x, POWER_OF_2, 448.0)
    return to_e4m3(tl.div_rn(x, scale[:, None]), EXACT_FIRST), scale


@triton.jit
def row_scales(x, POWER_OF_2: tl.constexpr, LARGEST: tl.constexpr):
    """Scales [rows] of a block [rows, 128]."""
    magnitude = tl.abs(x)
    # A maximum passes over NaN: what is not below infinity is counted.
    is_finite = tl.sum((magnitude < float("inf")).to(tl.int32), axis=1) == x.shape[1]
    return scale_of(tl.max(magnitude, axis=1), is_finite, POWER_OF_2, LARGEST)


@triton.jit
def to_e5m6(x):
    """fp32 within +-65024 (or NaN) to E5M6, to nearest even: int32 codes of 12 bits.

    As `ops/fp8_quantize.round_to_e5m6`: six mantissa bits are what is left of x beside 1.5 * 2^(e + 17), below 2^-14
    the step stays 2^-20, and a float16 whose last four bits are zero is the number's code.
    """
    bits = x.to(tl.int32, bitcast=True)
    exponent = tl.minimum(tl.maximum(bits & 0x7F800000, (127 - 14) << 23), (127 + 17) << 23)
    anchor = (exponent + (17 << 23)).to(tl.float32, bitcast=True) * 1.5
    rounded = ((x + anchor) - anchor).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    sign = (bits >> 20) & 0x800  # also of what became zero
    return ((rounded >> 4) & 0x7FF) | sign


@triton.jit
def from_e5m6(codes):
    """int32 codes of 12 bits to fp32."""
    return (codes << 4).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
