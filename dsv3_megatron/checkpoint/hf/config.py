"""`config.json` of a DeepSeek-V3-style model to our ModelConfig, and back.

Every setting in the file is either translated, or must have the one value that this library computes with, or
is known not to touch the weights' meaning. What is none of these is refused: a setting nobody looked at may
change the model.
"""

from __future__ import annotations

from typing import Any

from dsv3_megatron.checkpoint.layout import CheckpointError
from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.model import ModelConfig

MODEL_TYPE = "deepseek_v3"
# What the published checkpoint says of its FP8 weights.
QUANTIZATION = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}

# Our field for each setting that is a number of the architecture.
_FIELDS = {
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
_GROUP_SCORE_TOPK = 2
# `transformers` and DeepSeek's code norm the latents with this epsilon, whatever rms_norm_eps is.
_LATENT_EPSILON = 1e-6
# Left out of a file they mean this, as in `transformers`.
_DEFAULTS = {"n_shared_experts": 0, "n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0,
             "rms_norm_eps": 1e-6, "initializer_range": 0.02, "q_lora_rank": None}
_NULL = {"n_shared_experts": 0, "n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0}
# Settings with one value that this library computes with, and how they are written; None: not written.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "attention_dropout": (0.0,),
    "tie_word_embeddings": (False,),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "norm_topk_prob": (True,),
    "moe_layer_freq": (1,),
    "rope_interleave": (True, None),
    "pretraining_tp": (1, None),
    "mlp_bias": (False,),
}
_WRITTEN_FIXED = ("hidden_act", "attention_bias", "attention_dropout", "tie_word_embeddings", "scoring_func",
                  "topk_method", "norm_topk_prob", "moe_layer_freq")
# Read by other programs or about training; without effect on what the weights compute.
_IGNORED = frozenset({
    "architectures", "auto_map", "torch_dtype", "dtype", "transformers_version", "use_cache", "bos_token_id",
    "eos_token_id", "pad_token_id", "ep_size", "aux_loss_alpha", "seq_aux", "output_router_logits",
    "output_attentions", "output_hidden_states", "return_dict", "_name_or_path", "_attn_implementation",
    "_experts_implementation", "chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id",
    "problem_type", "router_aux_loss_coef"})
_ELSEWHERE = frozenset({"model_type", "quantization_config", "rope_theta", "rope_scaling", "rope_parameters",
                        "num_key_value_heads", "qk_head_dim", "head_dim", "num_mtp_layers", "num_local_experts"})
# YaRN's settings: ours, and what a file without them means in DeepSeek's and `transformers`' code.
_YARN = {"factor": ("rotary_scaling_factor", None),
         "original_max_position_embeddings": ("original_max_position_embeddings", None),
         "beta_fast": ("beta_fast", 32.0), "beta_slow": ("beta_slow", 1.0), "mscale": ("mscale", 1.0),
         "mscale_all_dim": ("mscale_all_dim", 0.0)}


def model_config_from_json(config: dict[str, Any], source: str = "config.json") -> ModelConfig:
    """The architecture that a `config.json` describes.

    Args:
        config: Its content.
        source: What to call it in messages.

    Returns:
        A validated ModelConfig. `init_method_std` is the file's `initializer_range`, which published files do not
        set to the value that was trained with; it has no effect on given weights.

    Raises:
        CheckpointError: another kind of model, a missing setting, one that this library does not compute with or
            does not know, or two that contradict each other.
    """
    if config.get("model_type") != MODEL_TYPE:
        raise CheckpointError(f"{source}: model_type={config.get('model_type')!r}; this library reads {MODEL_TYPE!r}")
    known = _FIELDS.keys() | _FIXED.keys() | _IGNORED | _ELSEWHERE
    unknown = sorted(config.keys() - known)
    if unknown:
        raise CheckpointError(
            f"{source}: {', '.join(f'{name}={config[name]!r}' for name in unknown)}: not known to this library, and "
            "may change what the weights compute; remove it from the file if it does not")
    for name, allowed in _FIXED.items():
        if name in config and config[name] not in allowed:
            raise CheckpointError(f"{source}: {name}={config[name]!r} is another model than this library's, which has "
                                  f"{name}={allowed[0]!r}")
    values: dict[str, Any] = {}
    for name, field in _FIELDS.items():
        values[field] = _number(config, name, source)
    # What a later phase with YaRN would extend; YaRN's own settings, where the file has them, come after it.
    values["original_max_position_embeddings"] = values["max_position_embeddings"]
    values |= _rotary(config, source)
    groups, top_k, kept = (values[field] for field in (
        "moe_router_num_groups", "moe_router_topk", "moe_router_group_topk"))
    if groups > 1 and top_k != _GROUP_SCORE_TOPK * kept:
        values["moe_router_group_score_topk"] = _GROUP_SCORE_TOPK
    if values["layernorm_epsilon"] != _LATENT_EPSILON:
        values["latent_layernorm_epsilon"] = _LATENT_EPSILON
    _check_derived(config, values, source)
    model = ModelConfig(**values)
    try:
        model.validate()
    except ConfigError as error:
        raise CheckpointError(f"{source}: {error}") from error
    return model


def model_config_to_json(model: ModelConfig, *, dtype: str, is_fp8: bool = False, bos_token_id: int | None = None,
                         eos_token_id: int | None = None) -> dict[str, Any]:
    """The `config.json` of a model, in the published checkpoint's spelling, which `transformers` reads too.

    `model_config_from_json` gives the same ModelConfig back, up to YaRN's fields where `rope_type` is "rope".

    Args:
        model: A validated architecture.
        dtype: "bfloat16" or "float32", of the weights that are not FP8.
        is_fp8: Whether the matrices are stored in block-wise FP8.
        bos_token_id: The tokenizer's, if it has one.
        eos_token_id: Likewise.

    Raises:
        CheckpointError: routing, norm or rotary settings that `config.json` cannot express.
    """
    _check_routing(model)
    if model.latent_epsilon != _LATENT_EPSILON:
        given = "layernorm_epsilon" if model.latent_layernorm_epsilon is None else "latent_layernorm_epsilon"
        raise CheckpointError(f"{given}={model.latent_epsilon}: config.json has no setting for the epsilon of the "
                              f"latents' norms, which is {_LATENT_EPSILON} in transformers and DeepSeek's code; train "
                              f"with latent_layernorm_epsilon={_LATENT_EPSILON}")
    content: dict[str, Any] = {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": MODEL_TYPE, "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id, "use_cache": True, "torch_dtype": dtype, "rope_interleave": True,
        "num_key_value_heads": model.num_attention_heads, "rope_theta": model.rotary_base,
        "rope_scaling": _rope_scaling(model)}
    content |= {name: getattr(model, field) for name, field in _FIELDS.items()}
    content |= {name: _FIXED[name][0] for name in _WRITTEN_FIXED}
    if is_fp8:
        content["quantization_config"] = dict(QUANTIZATION)
    return dict(sorted(content.items()))


def _check_routing(model: ModelConfig) -> None:
    """Refuse a choice of experts that programs which read the file would not make."""
    if model.moe_router_num_groups == 1:
        return
    summed = model.moe_router_group_score_topk or model.moe_router_topk // model.moe_router_group_topk
    if summed != _GROUP_SCORE_TOPK:
        given = ("" if model.moe_router_group_score_topk else
                 f" (topk / group_topk = {model.moe_router_topk} / {model.moe_router_group_topk})")
        raise CheckpointError(
            f"moe_router_group_score_topk={summed}{given}: transformers, vLLM and DeepSeek's code score a group by "
            f"its {_GROUP_SCORE_TOPK} best experts, would keep other groups and compute other logits; train with "
            f"moe_router_group_score_topk={_GROUP_SCORE_TOPK}")
    if model.moe_router_group_mask != "exclude":
        raise CheckpointError(f"moe_router_group_mask={model.moe_router_group_mask!r}: config.json has no setting for "
                              "it, and present readers exclude the experts of other groups")


def check_quantization(config: dict[str, Any], source: str = "config.json") -> bool:
    """Whether the file says that matrices are block-wise FP8.

    Raises:
        CheckpointError: they are quantized in another way.
    """
    stated = config.get("quantization_config")
    if stated is None:
        return False
    expected = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    for name, value in expected.items():
        # `transformers` leaves out fmt.
        if stated.get(name, value if name == "fmt" else None) != value:
            raise CheckpointError(f"{source}: quantization_config has {name}={stated.get(name)!r}; this library reads "
                                  f"{name}={value!r}")
    return True


def _number(config: dict[str, Any], name: str, source: str) -> Any:
    aliases = {"num_nextn_predict_layers": "num_mtp_layers", "n_routed_experts": "num_local_experts"}
    given = {key: config[key] for key in (name, aliases.get(name, name)) if key in config}
    if len(set(map(repr, given.values()))) > 1:
        raise CheckpointError(f"{source}: {' and '.join(f'{key}={value!r}' for key, value in given.items())} "
                              "contradict each other")
    if not given:
        if name not in _DEFAULTS:
            raise CheckpointError(f"{source}: {name} is missing")
        return _DEFAULTS[name]
    value = next(iter(given.values()))
    if value is None:
        value = _NULL.get(name)
        if value is None and name != "q_lora_rank":
            raise CheckpointError(f"{source}: {name}=null; it must be a number")
        return value
    return _typed(name, value, name in _FLOATS, source)


def _typed(name: str, value: Any, is_float: bool, source: str) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and is_float:
        return float(value)
    if is_number and float(value).is_integer():
        return int(value)
    raise CheckpointError(f"{source}: {name}={value!r} must be a {'' if is_float else 'whole '}number")


def _check_derived(config: dict[str, Any], values: dict[str, Any], source: str) -> None:
    """Settings that repeat others."""
    heads, rope = values["num_attention_heads"], values["qk_rope_head_dim"]
    expected = {"num_key_value_heads": ((heads, None), "num_attention_heads"),
                "qk_head_dim": ((values["qk_nope_head_dim"] + rope,), "qk_nope_head_dim + qk_rope_head_dim"),
                "head_dim": ((rope, None), "qk_rope_head_dim")}
    for name, (allowed, meaning) in expected.items():
        if name in config and config[name] not in allowed:
            raise CheckpointError(f"{source}: {name}={config[name]!r} contradicts {meaning}={allowed[0]}")


def _rotary(config: dict[str, Any], source: str) -> dict[str, Any]:
    """Our rotary fields out of `rope_theta` + `rope_scaling` (published) or `rope_parameters` (`transformers` 5)."""
    spellings: list[tuple[str, dict[str, Any]]] = []
    for name in ("rope_scaling", "rope_parameters"):
        content = config.get(name)
        if content is not None:
            if not isinstance(content, dict):
                raise CheckpointError(f"{source}: {name}={content!r} must hold settings by name")
            spellings.append((name, _one_spelling(content, f"{source}: {name}")))
    if config.get("rope_theta") is not None:
        theta = _typed("rope_theta", config["rope_theta"], True, source)
        if not any(name == "rope_scaling" for name, _ in spellings) and "rope_scaling" in config:
            # The published spelling of plain rotary embedding: rope_scaling is null.
            spellings.append(("rope_scaling", {"rope_type": "rope"}))
        spellings.append(("rope_theta", {"rotary_base": theta}))
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for name, fields in spellings:
        for field, value in fields.items():
            if field in merged and merged[field] != value:
                raise CheckpointError(f"{source}: {origin[field]} and {name} contradict each other: {field} is "
                                      f"{merged[field]!r} in one and {value!r} in the other")
            merged[field], origin[field] = value, name
    return {"rotary_base": 10000.0, "rope_type": "rope", **merged}


def _one_spelling(content: dict[str, Any], source: str) -> dict[str, Any]:
    types = {content[key] for key in ("type", "rope_type") if content.get(key) is not None}
    if len(types) > 1:
        raise CheckpointError(f"{source}: type={content['type']!r} contradicts rope_type={content['rope_type']!r}")
    kind = types.pop() if types else "default"
    fields: dict[str, Any] = {}
    if content.get("rope_theta") is not None:
        fields["rotary_base"] = _typed("rope_theta", content["rope_theta"], True, source)
    given = {key: value for key, value in content.items() if key not in ("type", "rope_type", "rope_theta")}
    if kind in ("default", "rope"):
        if given:
            raise CheckpointError(f"{source}: {', '.join(sorted(given))}: without effect under rope_type={kind!r}; "
                                  "remove them or set rope_type to 'yarn'")
        return {**fields, "rope_type": "rope"}
    if kind != "yarn":
        raise CheckpointError(f"{source}: rope_type={kind!r} is not known to this library; it has 'default' and "
                              "'yarn'")
    unknown = sorted(given.keys() - _YARN.keys())
    if unknown:
        raise CheckpointError(f"{source}: {', '.join(f'{name}={given[name]!r}' for name in unknown)}: not known to "
                              "this library, and may change what the weights compute")
    for name, (field, default) in _YARN.items():
        value = given.get(name, default)
        if value is None:
            raise CheckpointError(f"{source}: {name} is missing")
        fields[field] = _typed(name, value, name != "original_max_position_embeddings", source)
    return {**fields, "rope_type": "yarn"}


def _rope_scaling(model: ModelConfig) -> dict[str, Any] | None:
    if model.rope_type != "yarn":
        return None
    if model.mscale_all_dim == 0 and model.mscale != 1:
        raise CheckpointError(
            f"mscale={model.mscale} with mscale_all_dim=0: DeepSeek's and transformers' code read a config.json with "
            "these differently; use mscale=1, or mscale_all_dim above 0")
    return {"type": "yarn"} | {name: getattr(model, field) for name, (field, _) in _YARN.items()}
