"""Rotary settings of config.json in all their spellings."""

from __future__ import annotations

from dsv3_megatron.config.family_json import model_config_from_json
from tests.hugging_face import config_json
from tests.unit.checkpoint.hf.published import V3


def test_yarn_settings_left_out_mean_what_they_mean_in_transformers():
    content = config_json(V3)
    content["rope_scaling"] = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}
    model = model_config_from_json(content)
    assert (model.beta_fast, model.beta_slow, model.mscale, model.mscale_all_dim) == (32, 1, 1, 0)


def test_the_same_rotary_settings_in_both_spellings():
    content = config_json(V3)
    content["rope_parameters"] = {**content["rope_scaling"], "rope_type": "yarn", "rope_theta": 10000.0}
    assert model_config_from_json(content) == V3
