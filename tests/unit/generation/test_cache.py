"""Sizes of the caches as allocated, against the formulas; rows that leave; the choice of a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dsv3_megatron.config.presets import PRESETS, preset
from dsv3_megatron.generation.cache import make_cache, rows_kept
from dsv3_megatron.model.mcore_config import mcore_config


def cache_of(name: str, kind: str, dtype: torch.dtype, device: str = "meta", **sizes: int) -> Any:
    config = mcore_config(preset(name), "bf16")
    return make_cache(kind, config, dtype=dtype, device=torch.device(device),
                      **{"num_layers": config.num_layers, "num_rows": 3, "capacity": 40, **sizes})


def stored_bytes(cache: Any) -> int:
    return sum(value.numel() * value.element_size() for value in vars(cache).values()
               if isinstance(value, torch.Tensor))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", PRESETS)
def test_bytes_per_token_are_those_of_the_formula(name: str, dtype: torch.dtype) -> None:
    model, size = preset(name).model, dtype.itemsize
    latent, full = (cache_of(name, kind, dtype) for kind in ("latent", "full"))
    assert latent.bytes_per_token == model.num_layers * (model.kv_lora_rank + model.qk_rope_head_dim) * size
    assert full.bytes_per_token == (
        model.num_layers * model.num_attention_heads * (model.qk_head_dim + model.v_head_dim) * size)
    for cache in (latent, full):
        assert stored_bytes(cache) == cache.bytes_per_token * 3 * 40


def test_deepseek_v3_keeps_the_published_bytes() -> None:
    """70.272 KB: Insights into DeepSeek-V3, arXiv 2505.09343, table 1; 576 elements a layer, the MTP module's too."""
    assert cache_of("dsv3-671b", "latent", torch.bfloat16).bytes_per_token == 70_272
    assert cache_of("dsv3-671b", "full", torch.bfloat16).bytes_per_token == 4_997_120
    assert cache_of("dsv3-671b", "latent", torch.bfloat16, num_layers=1).bytes_per_token == 576 * 2


@pytest.mark.parametrize(("rows", "num_copied"), [([0, 1, 2], 0), ([0, 2], 1), ([2, 0], 2), ([1, 1, 0, 2], 4), ([], 0)])
def test_only_rows_that_move_are_copied(rows: list[int], num_copied: int) -> None:
    stored_LB = torch.arange(3.0).expand(2, 3).contiguous()
    kept_LB = rows_kept(stored_LB, rows)
    assert kept_LB.tolist() == [rows, rows]
    is_a_view = kept_LB.untyped_storage().data_ptr() == stored_LB.untyped_storage().data_ptr()
    assert is_a_view == (2 * num_copied <= len(rows))


@pytest.mark.parametrize("kind", ["latent", "full", "training"])
def test_rows_that_are_kept(kind: str) -> None:
    cache = cache_of("tiny", kind, torch.float32, device="cpu", num_layers=2)
    stored = {name: value for name, value in vars(cache).items() if isinstance(value, torch.Tensor)}
    for value in stored.values():
        value.copy_(torch.arange(3.0).view(1, 3, *[1] * (value.dim() - 2)))
    cache.keep([2, 0])
    for name in stored:
        kept = getattr(cache, name)
        assert kept.shape[1] == 2 and (kept[:, 0] == 2).all() and (kept[:, 1] == 0).all()


def test_an_unknown_cache() -> None:
    with pytest.raises(ValueError, match="kv_cache='half' must be one of latent, full, training"):
        cache_of("tiny", "half", torch.float32)
