"""FP8 arithmetic done slowly and obviously, for tests: rounding by search, products in plain loops and float64."""

from __future__ import annotations

import math

import torch

# Every finite value of the formats, rising.
E4M3_VALUES = sorted({
    sign * (2.0 ** (max(exponent, 1) - 7)) * ((mantissa / 8) + (exponent > 0))
    for sign in (1, -1) for exponent in range(16) for mantissa in range(8) if (exponent, mantissa) != (15, 7)})
E5M6_VALUES = sorted({
    sign * (2.0 ** (max(exponent, 1) - 15)) * ((mantissa / 64) + (exponent > 0))
    for sign in (1, -1) for exponent in range(31) for mantissa in range(64)})
VALUES = {"e4m3": E4M3_VALUES, "e5m6": E5M6_VALUES}
_MANTISSA_BITS = {"e4m3": 3, "e5m6": 6}
_MIN_EXPONENT = {"e4m3": -6, "e5m6": -14}


def nearest(number: float, format: str) -> float:
    """The value of the format nearest to a number; of two equally near ones that with an even last bit."""
    values = torch.tensor(VALUES[format], dtype=torch.float64)
    distance = (values - number).abs()
    candidates = values[distance == distance.min()].tolist()
    return min(candidates, key=lambda value: _last_bit(value, format))


def _last_bit(value: float, format: str) -> int:
    exponent = max(math.frexp(value)[1] - 1, _MIN_EXPONENT[format]) if value else _MIN_EXPONENT[format]
    return int(abs(value) / 2.0 ** (exponent - _MANTISSA_BITS[format])) % 2


def quantize_slowly(x: torch.Tensor, group: tuple[int, int], format: str, power_of_2: bool
                    ) -> tuple[torch.Tensor, torch.Tensor]:
    """Values (float64) and scales (fp32) of a matrix, group by group and value by value."""
    rows, columns = x.shape
    scales = torch.zeros(math.ceil(rows / group[0]), math.ceil(columns / group[1]))
    values = torch.zeros(rows, columns, dtype=torch.float64)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * group[0], (i + 1) * group[0]), slice(j * group[1], (j + 1) * group[1]))
            amax = x[part].abs().max().float()
            scale = (amax / max(VALUES[format])).item() if amax > 0 else 1.0
            scale = max(scale, 2.0**-126) if amax > 0 else 1.0
            if power_of_2:
                mantissa, exponent = math.frexp(scale)
                scale = 2.0 ** (exponent - (mantissa == 0.5))
            scales[i, j] = scale
            values[part] = torch.tensor([[nearest((v.float() / scales[i, j]).item(), format) for v in row]
                                         for row in x[part]], dtype=torch.float64)
    return values, scales


def product(a: torch.Tensor, a_scales: torch.Tensor, b: torch.Tensor, b_scales: torch.Tensor) -> torch.Tensor:
    """sum_k a[m, k] b[n, k] in float64, group by group of 128; scales are per row, or per 128 rows."""
    result = torch.zeros(a.shape[0], b.shape[0], dtype=torch.float64)
    for group in range(math.ceil(a.shape[1] / 128)):
        columns = slice(128 * group, 128 * (group + 1))
        partial = a[:, columns].double() @ b[:, columns].double().T
        result += partial * rows_of(a_scales, a.shape[0])[:, group, None] * rows_of(b_scales, b.shape[0])[:, group]
    return result


def rows_of(scales: torch.Tensor, rows: int) -> torch.Tensor:
    """Scales of each row, float64."""
    return (scales if len(scales) == rows else scales.repeat_interleave(128, 0)[:rows]).double()


def aligned_sum(products: list[float], accumulator: float, bits: int = 13) -> float:
    """One tensor-core instruction: all addends cut off `bits` below the largest one's leading bit, then the sum."""
    addends = [*products, accumulator]
    largest = max(abs(addend) for addend in addends)
    if largest == 0:
        return 0.0
    quantum = 2.0 ** (math.frexp(largest)[1] - 1 - bits)
    total = sum(math.trunc(addend / quantum) for addend in addends) * quantum
    if total == 0:
        return 0.0
    quantum = 2.0 ** (math.frexp(total)[1] - 1 - bits)
    return math.trunc(total / quantum) * quantum


def rounded(x: torch.Tensor, group: tuple[int, int], format: str = "e4m3", power_of_2: bool = False) -> torch.Tensor:
    """What x becomes in FP8, in float64, group by group; values rounded by torch (or by fp16 arithmetic for E5M6).

    `quantize_slowly` proves the rounding; this one is for matrices that a search over values would take too long for.
    """
    result = torch.zeros(x.shape, dtype=torch.float64)
    for i in range(0, x.shape[0], group[0]):
        for j in range(0, x.shape[1], group[1]):
            part = (slice(i, i + group[0]), slice(j, j + group[1]))
            values = x[part].float()
            scale = values.abs().max() / max(VALUES[format])
            scale = scale if scale > 0 else torch.tensor(1.0)
            if power_of_2:
                scale = 2.0 ** torch.ceil(torch.log2(scale.double())).float()
            scaled = values / scale
            if format == "e4m3":
                narrow = scaled.to(torch.float8_e4m3fn).double()
            else:
                step = 2.0 ** (torch.floor(torch.log2(scaled.double().abs().clamp_min(2.0**-14))) - 6)
                narrow = torch.round(scaled.double() / step) * step
            result[part] = narrow * scale.double()
    return result
