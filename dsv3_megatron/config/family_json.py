"""The architecture that a `config.json` of DeepSeek-V3's family describes, as a ModelConfig. No torch.

    model = model_of_folder("Moonlight-16B-A3B/")            # what --from-hf does
    model = model_config_from_json(content, "config.json")

Every setting that `transformers` reads for this kind of model is either translated, or must have the one value that
this library computes with. What it does not read it ignores, and so does this library, saying which settings these are;
but for a few that make other programs compute another model. `checkpoint/hf/config_json.py` writes such a file.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.json_files import read_json_object
from dsv3_megatron.config.json_numbers import typed_number
from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.config.rotary_settings import rotary_fields

FILE = "config.json"
MODEL_TYPE = "deepseek_v3"
# Types that are read. Kimi-K2 is DeepSeek-V3's architecture under a name of its own, by its makers so that engines can
# tell it apart; an export of other weights than the source's has MODEL_TYPE, which transformers has code for.
MODEL_TYPES = (MODEL_TYPE, "kimi_k2")

# Our field for each setting that is a number of the architecture.
FIELDS = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "intermediate_size": "ffn_hidden_size",
    "n_routed_experts": "num_experts",
    "moe_intermediate_size": "moe_ffn_hidden_size",
    "num_experts_per_tok": "moe_router_topk",
    "vocab_size": "vocab_size",
    "first_k_dense_replace": "num_dense_layers",
    "n_shared_experts": "num_shared_experts",
    "n_group": "moe_router_num_groups",
    "topk_group": "moe_router_group_topk",
    "routed_scaling_factor": "moe_router_topk_scaling_factor",
    "num_nextn_predict_layers": "mtp_num_layers",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "layernorm_epsilon",
    "initializer_range": "init_method_std",
}
_FLOATS = {"routed_scaling_factor", "rms_norm_eps", "initializer_range"}
# Every reader of these files scores a group by its two best experts, whatever topk / group_topk is; no setting says so.
GROUP_SCORE_TOPK = 2
# `transformers` and DeepSeek's code norm the latents with this epsilon, whatever rms_norm_eps is.
LATENT_EPSILON = 1e-6
# Left out of a file they mean DeepSeek-V3's own, in `transformers` and in DeepSeek's code alike.
_DEFAULTS = {"n_shared_experts": 1, "n_group": 8, "topk_group": 4, "num_nextn_predict_layers": 1,
             "rms_norm_eps": 1e-6, "initializer_range": 0.02, "q_lora_rank": 1536}
_NULL = {"n_shared_experts": 0, "n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0}
# Settings with the values that this library computes with; the first is what is written, where they are.
FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "tie_word_embeddings": (False,),
    "topk_method": ("noaux_tc",),
    "norm_topk_prob": (True,),
    "moe_layer_freq": (1,),
    "rope_interleave": (True,),
    "mlp_bias": (False,),
}
# Not settings of this architecture, but heeded by programs in any model that has them: the values without effect, and
# what the others do.
_FOREIGN: dict[str, tuple[tuple[Any, ...], str]] = {
    "sliding_window": ((None,), "transformers caches keys of a window only"),
    "attention_chunk_size": ((None,), "transformers caches keys of a chunk only"),
    "is_causal": ((True, None), "transformers lets every token attend to later ones"),
    "kv_sharing_modes": ((None,), "transformers shares caches between layers"),
    "per_layer_config": ((None, {}), "transformers changes settings of single layers"),
    "partial_rotary_factor": ((1, None), "transformers rotates a part of the rotary width"),
    "compression_config": ((None,), "transformers reads compressed weights"),
    "pruned_heads": ((None, {}), "transformers 4 removes heads"),
    "text_config": ((None,), "transformers takes settings"),
    "decoder": ((None,), "transformers takes settings"),
    "generator": ((None,), "transformers takes settings"),
    "index_topk": ((None,), "vLLM and SGLang take the model for one with sparse attention"),
}
# What `transformers` computes affinities with, and the only thing that DeepSeek's code reads here without an error.
SCORING_FUNC = "sigmoid"
# Read by other programs or about training; without effect on what the weights compute.
_IGNORED = frozenset({
    "architectures", "auto_map", "torch_dtype", "dtype", "transformers_version", "use_cache", "bos_token_id",
    "eos_token_id", "pad_token_id", "ep_size", "aux_loss_alpha", "seq_aux", "output_router_logits",
    "output_attentions", "output_hidden_states", "return_dict", "_name_or_path", "_attn_implementation",
    "_experts_implementation", "chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id",
    "problem_type", "router_aux_loss_coef", "attention_dropout", "pretraining_tp",
    "gradient_checkpointing"})
_ELSEWHERE = frozenset({"model_type", "quantization_config", "rope_theta", "rope_scaling", "rope_parameters",
                        "num_key_value_heads", "qk_head_dim", "head_dim", "num_mtp_layers", "num_local_experts",
                        "original_max_position_embeddings", "layer_types"})


def model_of_folder(folder: str | os.PathLike[str]) -> ModelConfig:
    """The architecture of a model in Hugging Face's layout; its weights are not looked at and may be missing.

    Args:
        folder: Folder with a `config.json`, or the path of such a file.

    Raises:
        ConfigError: there is none, it is no JSON object, or `model_config_from_json` refuses it.
    """
    path = Path(folder)
    if not path.exists():
        raise ConfigError(f"{path} does not exist, and nothing is downloaded; give a folder with the model's {FILE}, "
                          "or the path of such a file")
    file = path / FILE if path.is_dir() else path
    if not file.exists():
        raise ConfigError(f"{path} holds no {FILE}; give a folder with the model's, or the path of such a file")
    try:
        content = read_json_object(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read as a model's {FILE}: {error}") from error
    return model_config_from_json(content, str(file))


def model_config_from_json(config: dict[str, Any], source: str = "config.json") -> ModelConfig:
    """The architecture that a `config.json` describes.

    Args:
        config: Content of the file.
        source: What to call it in messages.

    Returns:
        A validated ModelConfig. `init_method_std` is the file's `initializer_range`, which published files do not
        set to the value that was trained with; it has no effect on given weights.

    Raises:
        ConfigError: another kind of model, a missing setting, one that this library does not compute with, or two
            that contradict each other.
    """
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise ConfigError(f"{source}: model_type={kind!r}; this library reads "
                          f"{' and '.join(map(repr, MODEL_TYPES))}")
    if config.get("scoring_func", SCORING_FUNC) != SCORING_FUNC:
        raise ConfigError(f"{source}: scoring_func={config['scoring_func']!r}: in a model of type {kind!r} "
                          f"transformers computes {SCORING_FUNC} affinities whatever this says, and other programs "
                          "do what it says: which of them the weights are for is not known")
    for name, allowed in FIXED.items():
        if name in config and config[name] not in allowed:
            raise ConfigError(f"{source}: {name}={config[name]!r} is another model than this library's, which has "
                              f"{name}={allowed[0]!r}")
    for name, (harmless, effect) in _FOREIGN.items():
        if name in config and config[name] not in harmless:
            raise ConfigError(f"{source}: {name}={config[name]!r}: not known to this library, and {effect} by it; "
                              "remove it from the file if the model was trained without")
    kinds = config.get("layer_types") or ()
    if any(kind != "full_attention" for kind in kinds):
        raise ConfigError(f"{source}: layer_types={kinds!r} is another model than this library's, whose layers all "
                          "have full_attention")
    values: dict[str, Any] = {}
    for name, field in FIELDS.items():
        values[field] = _number(config, name, source)
    # What a later phase with YaRN would extend; YaRN's own settings, where the file has them, come after it.
    values["original_max_position_embeddings"] = values["max_position_embeddings"]
    values |= rotary_fields(config, source)
    groups, top_k, kept = (values[field] for field in (
        "moe_router_num_groups", "moe_router_topk", "moe_router_group_topk"))
    if groups > 1 and top_k != GROUP_SCORE_TOPK * kept:
        values["moe_router_group_score_topk"] = GROUP_SCORE_TOPK
    if values["layernorm_epsilon"] != LATENT_EPSILON:
        values["latent_layernorm_epsilon"] = LATENT_EPSILON
    _check_derived(config, values, source)
    model = ModelConfig(**values)
    try:
        model.validate()
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
    return model


def ignored_settings(config: dict[str, Any]) -> list[str]:
    """Settings of a `config.json`, as NAME=VALUE, that neither `transformers` nor this library reads."""
    known = FIELDS.keys() | FIXED.keys() | {"scoring_func"} | _FOREIGN.keys() | _IGNORED | _ELSEWHERE
    return [f"{name}={config[name]!r}" for name in sorted(config.keys() - known)]


def _number(config: dict[str, Any], name: str, source: str) -> Any:
    aliases = {"num_nextn_predict_layers": "num_mtp_layers", "n_routed_experts": "num_local_experts"}
    given = {key: config[key] for key in (name, aliases.get(name, name)) if key in config}
    if len(set(map(repr, given.values()))) > 1:
        raise ConfigError(f"{source}: {' and '.join(f'{key}={value!r}' for key, value in given.items())} "
                          "contradict each other")
    if not given:
        if name not in _DEFAULTS:
            raise ConfigError(f"{source}: {name} is missing")
        return _DEFAULTS[name]
    value = next(iter(given.values()))
    if value is None:
        value = _NULL.get(name)
        if value is None and name != "q_lora_rank":
            raise ConfigError(f"{source}: {name}=null; it must be a number")
        return value
    return typed_number(name, value, name in _FLOATS, source)


def _check_derived(config: dict[str, Any], values: dict[str, Any], source: str) -> None:
    """Settings that repeat others."""
    heads, rope = values["num_attention_heads"], values["qk_rope_head_dim"]
    expected = {"num_key_value_heads": ((heads, None), "num_attention_heads"),
                "qk_head_dim": ((values["qk_nope_head_dim"] + rope,), "qk_nope_head_dim + qk_rope_head_dim"),
                "head_dim": ((rope, None), "qk_rope_head_dim")}
    for name, (allowed, meaning) in expected.items():
        if name in config and config[name] not in allowed:
            raise ConfigError(f"{source}: {name}={config[name]!r} contradicts {meaning}={allowed[0]}")
