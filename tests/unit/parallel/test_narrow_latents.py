"""Latents as bytes: their size, what comes back, and the shared key that is not rounded."""

from __future__ import annotations

import pytest
import torch

from dsv3_megatron.ops.fp8.quantize import quantize
from dsv3_megatron.parallel.narrow_latents import NarrowLatents


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_token_of_deepseek_v3_takes_656_bytes_in_bf16_and_comes_back(dtype: torch.dtype) -> None:
    passed = torch.randn(6, 2, 512 + 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    passed[0, 0, :128] *= 1000.0  # a tile of its own scale
    narrow = NarrowLatents(512)
    records = narrow.packed(passed)
    assert records.shape == (6, 2, 512 + 16 + 64 * dtype.itemsize) and records.dtype == torch.uint8
    back = narrow.unpacked(records, dtype)
    assert back.dtype == dtype and torch.equal(back[..., 512:], passed[..., 512:])
    latents = passed[..., :512].flatten(0, 1)
    assert torch.equal(back[..., :512].flatten(0, 1), quantize(latents, power_of_2=True).dequantize(dtype))
    # Three bits behind the point: half a step is a sixteenth of a value.
    assert ((back - passed).abs() <= passed.abs() / 16 + 1e-2).all()
    assert torch.equal(narrow.unpacked(narrow.packed(back), dtype), back)
