"""ModelConfig to config.json and back, in both spellings; what a file cannot say is refused."""

from __future__ import annotations

import dataclasses
import json

import pytest
from transformers import DeepseekV3Config

from dsv3_megatron.checkpoint.folder import CheckpointError
from dsv3_megatron.checkpoint.hf import model_config_to_json
from dsv3_megatron.config.family_json import model_config_from_json
from dsv3_megatron.config.presets import PRESETS, preset
from tests.hugging_face import config_json
from tests.parity.architectures import PUBLISHED, variant
from tests.unit.checkpoint.hf.published import V3


def rotary_rebuilt(model):
    """What plain rotary embedding does not use: the context itself as YaRN's original one, and YaRN's defaults."""
    if model.rope_type == "yarn":
        return model
    plain = preset("tiny").model
    return dataclasses.replace(model, original_max_position_embeddings=model.max_position_embeddings, **{
        name: getattr(plain, name) for name in (
            "rotary_scaling_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")})


@pytest.mark.parametrize("name", PUBLISHED)
def test_there_and_back(name):
    model = variant(name, **({"moe_router_group_score_topk": 2} if name == "groups-keep-one" else {}))
    content = json.loads(json.dumps(model_config_to_json(model, dtype="float32")))
    assert model_config_from_json(content) == rotary_rebuilt(model)


@pytest.mark.parametrize("changes, summed", [
    ({"n_group": 4, "topk_group": 2, "num_experts_per_tok": 4}, None),  # V3's proportion: the report's rule says 2 too
    ({"n_group": 4, "topk_group": 1, "num_experts_per_tok": 4}, 2),
    ({"n_group": 4, "topk_group": 3, "num_experts_per_tok": 4}, 2),
    ({"n_group": 1, "topk_group": 1, "num_experts_per_tok": 4}, None),
], ids=str)
def test_groups_are_scored_by_their_two_best_experts(changes, summed):
    model = model_config_from_json({**config_json(variant("plain", num_experts=16)), **changes})
    assert model.moe_router_group_score_topk == summed
    assert model_config_from_json(model_config_to_json(model, dtype="float32")).moe_router_group_score_topk == summed


def test_latents_are_normed_with_their_own_epsilon():
    model = model_config_from_json({**config_json(variant("plain")), "rms_norm_eps": 1e-5})
    assert (model.layernorm_epsilon, model.latent_epsilon) == (1e-5, 1e-6)
    assert model_config_from_json(model_config_to_json(model, dtype="float32")) == model


@pytest.mark.parametrize("changes, message", [
    ({"layernorm_epsilon": 1e-5}, "layernorm_epsilon=1e-05: config.json has no setting for the epsilon of the "),
    ({"latent_layernorm_epsilon": 1e-5}, "latent_layernorm_epsilon=1e-05: config.json has no setting"),
    ({"moe_router_topk": 6}, r"moe_router_group_score_topk=3 \(topk / group_topk = 6 / 2\): transformers, vLLM and "
     r"DeepSeek's code score a group by its 2 best experts"),
    ({"moe_router_group_score_topk": 1}, "moe_router_group_score_topk=1: transformers"),
    ({"moe_router_group_mask": "zero"}, "moe_router_group_mask='zero': config.json has no setting for it"),
    ({"moe_router_score_function": "softmax"}, "moe_router_score_function='softmax': config.json cannot express its "),
    ({"moe_router_score_function": "softmax", "moe_router_num_groups": 1, "moe_router_group_topk": 1},
     "moe_router_score_function='softmax': config.json cannot express its affinities"),
])
def test_models_that_no_reader_of_the_file_computes(changes, message):
    with pytest.raises(CheckpointError, match=message):
        model_config_to_json(variant("groups", **changes), dtype="float32")


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_there_and_back(name):
    model = preset(name).model
    assert model_config_from_json(model_config_to_json(model, dtype="bfloat16")) == model


@pytest.mark.parametrize("name", ["plain", "yarn", "yarn-mscale", "full-rank-query", "no-shared", "no-mtp", "mtp-2"])
def test_as_transformers_writes_it(name, tmp_path):
    """Our file, read and written again by transformers, in its own spelling of the rotary settings."""
    model = variant(name)
    (tmp_path / "config.json").write_text(json.dumps(model_config_to_json(model, dtype="float32")))
    DeepseekV3Config.from_pretrained(tmp_path).save_pretrained(tmp_path / "theirs")
    content = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert "rope_parameters" in content and "rope_theta" not in content
    assert model_config_from_json(content) == rotary_rebuilt(model)


@pytest.mark.parametrize("changes", [{"mscale": 0.7, "mscale_all_dim": 0.0}, {"mscale": 0.0}], ids=str)
def test_what_config_json_cannot_express(changes):
    model = dataclasses.replace(V3, **changes)
    with pytest.raises(CheckpointError, match="read a config.json with these differently"):
        model_config_to_json(model, dtype="bfloat16")
