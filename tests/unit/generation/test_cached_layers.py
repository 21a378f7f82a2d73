"""Parts of a layer over rows of tokens have the bits of what training computes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from dsv3_megatron.generation.cached_layers import Norm
from dsv3_megatron.ops.rms_norm import rms_norm


@pytest.mark.parametrize("width", [24, 96, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_norm_has_trainings_bits_in_each_of_many_rows(width: int, dtype: torch.dtype) -> None:
    """Steps in another order round otherwise in 8 rows of 20,000 of width 96 in bf16, so few rows show nothing."""
    draws = torch.Generator().manual_seed(0)
    weight = (1 + 0.1 * torch.randn(width, generator=draws)).to(dtype)
    rows = (torch.randn(20_000, width, generator=draws) * 3 * torch.rand(20_000, 1, generator=draws)).to(dtype)
    norm = Norm(cast(Any, SimpleNamespace(weight=weight, eps=1e-6)))
    with torch.no_grad():
        found = torch.cat([norm(part) for part in rows.split(100)])
        assert torch.equal(found, rms_norm(rows, weight, 1e-6))
