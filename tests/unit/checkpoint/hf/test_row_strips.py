"""Strips cover a tensor once, in whole rows of blocks; bits are compared, not values."""

from __future__ import annotations

import math

import pytest
import torch

from dsv3_megatron.checkpoint.hf.row_strips import STRIP_ELEMENTS, row_strips, same_bits


@pytest.mark.parametrize("shape", [(7168,), (1,), (0, 5), (129, 1), (18432, 7168), (300, 20_000_000), (129_280, 7168)])
def test_strips_cover_a_tensor(shape):
    strips = list(row_strips(shape))
    assert [first for first, _ in strips] == [sum(count for _, count in strips[:i]) for i in range(len(strips))]
    assert sum(count for _, count in strips) == shape[0]
    assert all(first % 128 == 0 and count > 0 for first, count in strips)
    width = math.prod(shape[1:])
    assert all(count * width <= max(STRIP_ELEMENTS, 128 * width) for _, count in strips)
    assert all(count % 128 == 0 for _, count in strips[:-1]), "but for the last, whole blocks"


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1, 7, 8, 64])
def test_same_bits(dtype, size):
    values = torch.arange(-3, size - 3).float().to(dtype)
    assert same_bits(values, values.clone())
    for place in {0, size - 1}:
        other = values.clone()
        other.view(torch.uint8)[place * dtype.itemsize] ^= 1
        assert not same_bits(values, other)


def test_same_bits_of_special_values():
    nan, zero = torch.tensor([float("nan")]), torch.zeros(2)
    assert same_bits(nan, nan.clone()) and not same_bits(zero, -zero)
    assert not same_bits(zero, torch.zeros(3)) and not same_bits(zero, zero.int())
    assert same_bits(torch.arange(9.0)[1:], torch.arange(1.0, 9.0)), "also a view that does not begin at eight bytes"
