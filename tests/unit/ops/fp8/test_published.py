"""FP8 weights in blocks against plain loops and an exhaustive search over all E4M3 values."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_megatron.ops.fp8.published import (
    LARGEST_SCALE,
    SMALLEST_SCALE,
    dequantize_weight_blocks,
    quantize_weight_blocks,
    requantize_weight_blocks,
    scale_shape,
)

# Every finite E4M3 value, as bytes and as numbers.
BYTES = torch.tensor([byte for byte in range(256) if byte & 0x7F != 0x7F], dtype=torch.uint8)
VALUES = BYTES.view(torch.float8_e4m3fn).double()


def nearest(number: float) -> float:
    """The E4M3 value nearest to a number, of two equally near ones that with an even last bit: by search."""
    distance = (VALUES - number).abs()
    candidates = (distance == distance.min()).nonzero().flatten().tolist()
    even = [i for i in candidates if BYTES[i] % 2 == 0]
    return VALUES[(even or candidates)[0]].item()


def quantize_slowly(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = weight.shape
    scales = torch.zeros(math.ceil(rows / 128), math.ceil(columns / 128))
    values = torch.zeros(rows, columns, dtype=torch.float64)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = weight[128 * i: 128 * (i + 1), 128 * j: 128 * (j + 1)].float()
            amax = block.abs().max()
            scales[i, j] = amax / 448 if amax > 0 else 1.0
            for r in range(block.shape[0]):
                for c in range(block.shape[1]):
                    values[128 * i + r, 128 * j + c] = nearest((block[r, c] / scales[i, j]).item())
    return values, scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 130), (130, 5), (129, 129)])
def test_against_plain_loops(shape, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[0] = 0
    values, scales = quantize_weight_blocks(weight)
    expected_values, expected_scales = quantize_slowly(weight)
    assert torch.equal(scales, expected_scales)
    assert torch.equal(values.double(), expected_values)


def test_zeros_subnormals_extremes():
    weight = torch.zeros(129, 257)
    weight[0, 0], weight[1, 0] = -0.0, 0.0
    weight[0, 128] = 1e-44  # subnormal: its scale would be below the smallest normal number
    weight[128, 0] = torch.finfo(torch.float32).max
    values, scales = quantize_weight_blocks(weight)
    assert scales[0, 0] == 1 and scales[0, 1] == torch.finfo(torch.float32).tiny
    assert values[128, 0].float() == 448
    assert torch.isfinite(values.float()).all() and torch.isfinite(scales).all()
    assert values.view(torch.uint8)[0, 0] == 0x80, "the sign of zero is kept"


def test_the_weight_itself_stays():
    weight = torch.randn(256, 128)
    before = weight.clone()
    quantize_weight_blocks(weight)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_a_number(value):
    weight = torch.zeros(130, 130)
    weight[129, 129] = value
    with pytest.raises(ValueError, match="infinite or not a number has no FP8 form"):
        quantize_weight_blocks(weight)


@settings(max_examples=25)
@given(rows=st.integers(1, 1100), columns=st.integers(1, 300), seed=st.integers(0, 1000),
       spread=st.sampled_from([0.0, 3.0, 60.0]), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_bytes_come_back(rows, columns, seed, spread, dtype):
    """Any E4M3 bytes with any scales in the stated range, through FP32 or BF16: the same bytes."""
    stream = torch.Generator().manual_seed(seed)
    picked = torch.randint(len(BYTES), (rows, columns), generator=stream)
    values = BYTES[picked].view(torch.float8_e4m3fn)
    scales = torch.exp(torch.randn(scale_shape((rows, columns)), generator=stream) * spread - 8)
    scales = scales.clamp(SMALLEST_SCALE, LARGEST_SCALE)
    weight = dequantize_weight_blocks(values, scales, dtype)
    assert torch.isfinite(weight).all()
    back = requantize_weight_blocks(weight, scales)
    assert torch.equal(back.view(torch.uint8), values.view(torch.uint8))


def test_every_value_comes_back_at_both_ends_of_the_range():
    values = BYTES.view(torch.float8_e4m3fn).view(1, -1)
    for scale in (SMALLEST_SCALE, LARGEST_SCALE):
        scales = torch.full((1, 2), scale)
        for dtype in (torch.float32, torch.bfloat16):
            back = requantize_weight_blocks(dequantize_weight_blocks(values, scales, dtype), scales)
            assert torch.equal(back.view(torch.uint8), values.view(torch.uint8))


def test_scales_that_do_not_fit():
    with pytest.raises(ValueError, match=r"torch.float32 \(2, 1\)"):
        dequantize_weight_blocks(torch.zeros(129, 128, dtype=torch.float8_e4m3fn), torch.ones(1, 1))
    with pytest.raises(ValueError, match="torch.bfloat16"):
        requantize_weight_blocks(torch.zeros(128, 128), torch.ones(1, 1, dtype=torch.bfloat16))
