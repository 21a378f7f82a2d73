"""Quantization with one scale for a group of values: tiles of activations, blocks of weights, columns of tokens.

    group        of what                                             in the report
    (1, 128)     a token's 128 channels                              activations and their gradients
    (128, 128)   128 outputs x 128 inputs                            weights
    (1, 128) of the transpose                                        128x1: 128 tokens of a channel, for Wgrad

A value stands for `value * scale` in fp32. Scales come from the group's own largest magnitude. Edges need not be
multiples of 128: the last group is smaller. What is infinite or not a number stays so: its whole group gets the scale
NaN, so that products, gradients and their norm show it; nothing is saturated into a finite number.

Formats: E4M3 is torch's `float8_e4m3fn`. E5M6 (1 sign bit, 5 exponent bits, 6 of mantissa; bias 15, subnormals,
infinities, as IEEE 754 would have it) is no dtype of torch: its values are packed, two in three bytes. They are the
float16 numbers whose last four mantissa bits are zero.

This is the reference, in plain torch on any device; kernels are compared with it.

Source: DeepSeek-V3 report, sections 3.3.2 and 3.3.3.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from dsv3_megatron.ops.fp8.scale_groups import E4M3_MAX, TILE, Group, join_groups, split_into_groups, spread

E5M6_MAX = 65024.0  # (2 - 2^-6) * 2^15
FORMAT_MAX = {"e4m3": E4M3_MAX, "e5m6": E5M6_MAX}
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Quantized:
    """A matrix, or a stack of matrices, as narrow values and the scales of their groups.

    Attributes:
        values: "e4m3": float8_e4m3fn [..., M, K]. "e5m6": uint8 [n], packed.
        scales: fp32 [..., ceil(M / rows), ceil(K / columns)]; NaN for a group with a value that is not finite.
        group: Rows and columns of a group.
        format: "e4m3" or "e5m6".
        shape: [..., M, K].
        turned: Values of a weight once more, [..., K, M] contiguous, where a backend needs them.
    """

    values: torch.Tensor
    scales: torch.Tensor
    group: Group
    format: str
    shape: tuple[int, ...]
    turned: torch.Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of values and scales."""
        return self.values.nbytes + self.scales.nbytes

    def transpose(self) -> Quantized:
        """The transposed matrix, of the same values and scales; E4M3 only."""
        assert self.format == "e4m3", "packed values have no transposed view"
        values = self.values.transpose(-1, -2) if self.turned is None else self.turned
        return Quantized(values, self.scales.transpose(-1, -2), self.group[::-1], "e4m3",
                         (*self.shape[:-2], self.shape[-1], self.shape[-2]))

    def __getitem__(self, index: int) -> Quantized:
        """One matrix of a stack."""
        turned = None if self.turned is None else self.turned[index]
        return Quantized(self.values[index], self.scales[index], self.group, self.format, self.shape[1:], turned)

    def rows(self, rows: slice) -> Quantized:
        """Some rows of an E4M3 matrix whose groups are one row high."""
        assert self.format == "e4m3" and self.group[0] == 1
        values = self.values[rows]
        return Quantized(values, self.scales[rows], self.group, "e4m3", tuple(values.shape))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Compute the matrix that is meant: value * scale in fp32, rounded on to `dtype`."""
        if self.format == "e4m3":
            wide = decode_e4m3(self.values)
        else:
            wide = unpack_e5m6(self.values, self.shape).float()
        groups = split_into_groups(wide, self.group)
        return join_groups(groups * spread(self.scales), self.shape).to(dtype)


def quantize(x: torch.Tensor, group: Group = TILE, *, format: str = "e4m3", power_of_2: bool = False) -> Quantized:
    """Round x to `format` with a scale for each group.

    Args:
        x: Floating point, [..., M, K].
        group: Rows and columns that share a scale.
        format: "e4m3" or "e5m6".
        power_of_2: Scales are rounded up to powers of two, so that quantizing the result again, in other groups, moves
            only what falls below the new group's smallest normal number.

    Returns:
        Values x / scale, rounded to nearest even. scale = amax / 448 ("e5m6": / 65024); 1 for a group of zeros; at
        least 2^-126, the smallest normal number. A group with NaN or an infinity has the scale NaN.

    Raises:
        ValueError: Unknown format.

    Source: DeepSeek-V3 report, section 3.3.2. Its inference code keeps amax above 1e-4, which would turn small
        gradients into zeros; this does not.
    """
    if format not in FORMAT_MAX:
        raise ValueError(f"format={format!r} of quantize must be one of {', '.join(FORMAT_MAX)}")
    groups = split_into_groups(x.float(), group)
    scales = group_scales(groups.abs().amax(dim=(-3, -1)), FORMAT_MAX[format], power_of_2=power_of_2)
    scaled = join_groups(groups / spread(scales), x.shape)
    rounded = round_scaled(scaled, scales, group, format)
    return Quantized(rounded if format == "e4m3" else pack_e5m6(rounded), scales, group, format, tuple(x.shape))


def round_scaled(scaled: torch.Tensor, scales: torch.Tensor, group: Group, format: str) -> torch.Tensor:
    """Values that are divided by their scales, rounded to nearest even: the one place in which a value is rounded.

    Args:
        scaled: fp32 [..., M, K].
        scales: Scales of the groups, which decide nothing here; whoever looks at roundings tells values by them.
        group: Rows and columns of a group.
        format: "e4m3" or "e5m6".

    Returns:
        float8_e4m3fn, or float16 with values that E5M6 has.
    """
    return scaled.to(torch.float8_e4m3fn) if format == "e4m3" else round_to_e5m6(scaled)


def quantize_columns(x: torch.Tensor | Quantized, *, power_of_2: bool = False) -> Quantized:
    """Quantize [M, K] in groups of 128 rows of a column, laid out as its transpose [K, M] in tiles of 128.

    A `Quantized` is first dequantized: this is the requantization of cached activations for the weight gradient. With
    powers of two on both sides it adds no error, except where a value falls below the new group's normal range (2^-6
    of its scale): there at most 2^-10 of the scale.

    Source: DeepSeek-V3 report, section 3.5.2.
    """
    wide = x.dequantize() if isinstance(x, Quantized) else x
    return quantize(wide.t().contiguous(), TILE, power_of_2=power_of_2)


def group_scales(amax: torch.Tensor, largest: float, *, power_of_2: bool) -> torch.Tensor:
    """Scales that map each group's largest magnitude onto the format's largest number."""
    scales = (amax / largest).clamp_min_(_TINY)
    if power_of_2:
        scales = round_up_to_power_of_2(scales)
    scales = torch.where(amax == 0, torch.ones_like(scales), scales)
    return torch.where(torch.isfinite(amax), scales, torch.full_like(scales, float("nan")))


def round_up_to_power_of_2(x: torch.Tensor) -> torch.Tensor:
    """The smallest power of two that is not below x; x normal and positive fp32 below 2^127 (others: meaningless)."""
    bits = x.view(torch.int32)
    exponent = (bits + 0x7FFFFF) & 0x7F800000
    return exponent.view(torch.float32)


def decode_e4m3(values: torch.Tensor) -> torch.Tensor:
    """E4M3 as fp32; on CPU through a table of all pairs of values.

    On a core of an Intel Xeon with AMX: 1.3 G values/s so, 0.8 through a table of single ones, 0.2 in torch's cast.
    """
    if values.device.type != "cpu":
        return values.float()
    codes = values.contiguous().view(torch.uint8).view(-1)
    if codes.numel() % 2 or codes.storage_offset() % 2:
        return _e4m3_numbers().index_select(0, codes.int()).view(values.shape)
    wide = _e4m3_pairs().index_select(0, codes.view(torch.uint16).int())
    return wide.view(torch.float32).view(values.shape)


@functools.cache
def _e4m3_numbers() -> torch.Tensor:
    """Every E4M3 number, by its code."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


@functools.cache
def _e4m3_pairs() -> torch.Tensor:
    """Every two E4M3 numbers, by both codes in the order of memory, as the bits of two fp32: int64 [65536]."""
    codes = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.uint8).view(-1)
    return _e4m3_numbers().index_select(0, codes.int()).view(torch.int64)


def round_to_e5m6(x: torch.Tensor) -> torch.Tensor:
    """fp32 numbers rounded once, to nearest even, to E5M6, as float16, which holds every E5M6 number.

    Adding and taking away 1.5 * 2^(e + 17) leaves a number of exponent e with 6 mantissa bits: its last bit is then
    2^(e - 6). Below 2^-14 the step stays that of the subnormals, 2^-20. Above 65024 the result is infinite.
    """
    exponent = (x.view(torch.int32) & 0x7F800000).clamp_(min=(127 - 14) << 23, max=(127 + 17) << 23)
    anchor = (exponent + (17 << 23)).view(torch.float32) * 1.5
    rounded = torch.copysign((x + anchor) - anchor, x)
    beyond = rounded.abs() > E5M6_MAX
    return torch.where(beyond, torch.copysign(torch.full_like(x, float("inf")), x), rounded).half()


def pack_e5m6(values: torch.Tensor) -> torch.Tensor:
    """float16 values whose last four bits are zero as 12 bits each: uint8 [3 * ceil(n / 2)]."""
    codes = (values.reshape(-1).view(torch.int16) >> 4) & 0xFFF
    if codes.numel() % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    first, second = codes.view(-1, 2).unbind(1)
    packed = torch.stack((first & 0xFF, (first >> 8) | ((second & 0xF) << 4), second >> 4), dim=1)
    return packed.to(torch.uint8).view(-1)


def unpack_e5m6(packed: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Undo `pack_e5m6`: float16 of this shape."""
    low, middle, high = packed.view(-1, 3).to(torch.int16).unbind(1)
    codes = torch.stack((low | ((middle & 0xF) << 8), (middle >> 4) | (high << 4)), dim=1).view(-1)
    return (codes << 4).view(torch.float16)[: torch.Size(shape).numel()].view(shape)
