"""Published models of the family: their presets, and shrunk ones beside Transformers."""

from __future__ import annotations

import dataclasses

import pytest

from dsv3_megatron.checkpoint.hf.config_json import check_quantization, model_config_to_json
from dsv3_megatron.config.family_json import model_config_from_json
from dsv3_megatron.config.presets import preset
from tests.family import FAMILY, small_config
from tests.parity.test_transformers import check

PRESET_OF = {"moonlight-16b": "moonlight-16b", "kimi-k2": "kimi-k2", "deepseek-v3.1": "dsv3-671b"}
# What the published files say and a run from the beginning does not have: a longer context, and V3's initial width.
EXTENSION = ("max_position_embeddings", "original_max_position_embeddings", "rope_type", "rotary_scaling_factor",
             "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "init_method_std")


@pytest.mark.parametrize("name", FAMILY)
def test_the_preset_is_the_published_architecture(name: str) -> None:
    published = model_config_from_json(FAMILY[name])
    ours = preset(PRESET_OF[name]).model
    assert dataclasses.replace(ours, **{field: getattr(published, field) for field in EXTENSION}) == published
    if "rope_scaling" not in FAMILY[name]:
        assert ours == published
    assert check_quantization(FAMILY[name]) is ("quantization_config" in FAMILY[name])
    assert model_config_from_json(model_config_to_json(published, dtype="bfloat16")) == published


@pytest.mark.parametrize("length", [11, 37])
@pytest.mark.parametrize("name", FAMILY)
def test_equals_transformers(build, groups, name: str, length: int) -> None:
    """Hidden states, logits, routing and every gradient within 1e-5, within and beyond the original context."""
    check(build, groups, model_config_from_json(small_config(name)), length)
