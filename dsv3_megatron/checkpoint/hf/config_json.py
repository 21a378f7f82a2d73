"""`config.json` of a DeepSeek-V3-style model to our ModelConfig, and back.

Every setting that `transformers` reads for this kind of model is either translated, or must have the one value that
this library computes with. What it does not read it ignores, and so does this library, saying which settings these are;
but for a few that make other programs compute another model.
"""

from __future__ import annotations

from typing import Any

from dsv3_megatron.checkpoint.folder import CheckpointError
from dsv3_megatron.checkpoint.hf.json_numbers import typed_number
from dsv3_megatron.checkpoint.hf.rotary_settings import rope_scaling, rotary_fields
from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.model import ModelConfig

MODEL_TYPE = "deepseek_v3"
# Types that are read. Kimi-K2 is DeepSeek-V3's architecture under a name of its own, by its makers so that engines can
# tell it apart; an export of other weights than the source's has MODEL_TYPE, which transformers has code for.
MODEL_TYPES = (MODEL_TYPE, "kimi_k2")
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
# Left out of a file they mean DeepSeek-V3's own, in `transformers` and in DeepSeek's code alike.
_DEFAULTS = {"n_shared_experts": 1, "n_group": 8, "topk_group": 4, "num_nextn_predict_layers": 1,
             "rms_norm_eps": 1e-6, "initializer_range": 0.02, "q_lora_rank": 1536}
_NULL = {"n_shared_experts": 0, "n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0}
# Settings with the values that this library computes with; the first is what is written, where they are.
_FIXED: dict[str, tuple[Any, ...]] = {
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
_WRITTEN_FIXED = ("hidden_act", "attention_bias", "tie_word_embeddings", "topk_method", "norm_topk_prob",
                  "moe_layer_freq", "rope_interleave")
# What `transformers` computes affinities with, and the only thing that DeepSeek's code reads here without an error.
SCORING_FUNC = "sigmoid"
_WRITTEN_BESIDE = {"scoring_func": SCORING_FUNC, "attention_dropout": 0.0, "use_cache": True}
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


def model_config_from_json(config: dict[str, Any], source: str = "config.json") -> ModelConfig:
    """The architecture that a `config.json` describes.

    Args:
        config: Content of the file.
        source: What to call it in messages.

    Returns:
        A validated ModelConfig. `init_method_std` is the file's `initializer_range`, which published files do not
        set to the value that was trained with; it has no effect on given weights.

    Raises:
        CheckpointError: another kind of model, a missing setting, one that this library does not compute with, or two
            that contradict each other.
    """
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise CheckpointError(f"{source}: model_type={kind!r}; this library reads "
                              f"{' and '.join(map(repr, MODEL_TYPES))}")
    if config.get("scoring_func", SCORING_FUNC) != SCORING_FUNC:
        raise CheckpointError(f"{source}: scoring_func={config['scoring_func']!r}: in a model of type {kind!r} "
                              f"transformers computes {SCORING_FUNC} affinities whatever this says, and other programs "
                              "do what it says: which of them the weights are for is not known")
    for name, allowed in _FIXED.items():
        if name in config and config[name] not in allowed:
            raise CheckpointError(f"{source}: {name}={config[name]!r} is another model than this library's, which has "
                                  f"{name}={allowed[0]!r}")
    for name, (harmless, effect) in _FOREIGN.items():
        if name in config and config[name] not in harmless:
            raise CheckpointError(f"{source}: {name}={config[name]!r}: not known to this library, and {effect} by it; "
                                  "remove it from the file if the model was trained without")
    kinds = config.get("layer_types") or ()
    if any(kind != "full_attention" for kind in kinds):
        raise CheckpointError(f"{source}: layer_types={kinds!r} is another model than this library's, whose layers all "
                              "have full_attention")
    values: dict[str, Any] = {}
    for name, field in _FIELDS.items():
        values[field] = _number(config, name, source)
    # What a later phase with YaRN would extend; YaRN's own settings, where the file has them, come after it.
    values["original_max_position_embeddings"] = values["max_position_embeddings"]
    values |= rotary_fields(config, source)
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


def ignored_settings(config: dict[str, Any]) -> list[str]:
    """Settings of a `config.json`, as NAME=VALUE, that neither `transformers` nor this library reads."""
    known = _FIELDS.keys() | _FIXED.keys() | {"scoring_func"} | _FOREIGN.keys() | _IGNORED | _ELSEWHERE
    return [f"{name}={config[name]!r}" for name in sorted(config.keys() - known)]


def model_config_to_json(model: ModelConfig, *, dtype: str, is_fp8: bool = False, bos_token_id: int | None = None,
                         eos_token_id: int | None = None, pad_token_id: int | None = None) -> dict[str, Any]:
    """The `config.json` of a model, in the published checkpoint's spelling, which `transformers` reads too.

    `model_config_from_json` gives the same ModelConfig back, up to YaRN's fields where `rope_type` is "rope".

    Args:
        model: A validated architecture.
        dtype: "bfloat16" or "float32", of the weights that are not FP8.
        is_fp8: Whether the matrices are stored in block-wise FP8.
        bos_token_id: The tokenizer's, if it has one.
        eos_token_id: The tokenizer's end-of-sequence token, if it has one.
        pad_token_id: The tokenizer's padding token, if it has one; programs that train on do not change its embedding.

    Raises:
        CheckpointError: affinities, routing, norm or rotary settings that `config.json` cannot express.
    """
    refusals = export_refusals(model)
    if refusals:
        raise CheckpointError("; ".join(refusals))
    content: dict[str, Any] = {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": MODEL_TYPE, "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id, "pad_token_id": pad_token_id, "torch_dtype": dtype,
        "num_key_value_heads": model.num_attention_heads, "rope_theta": model.rotary_base,
        "rope_scaling": rope_scaling(model)}
    content |= {name: getattr(model, field) for name, field in _FIELDS.items()}
    content |= {name: _FIXED[name][0] for name in _WRITTEN_FIXED} | _WRITTEN_BESIDE
    if is_fp8:
        content["quantization_config"] = dict(QUANTIZATION)
    return dict(sorted(content.items()))


def export_refusals(model: ModelConfig) -> list[str]:
    """Why a model cannot be exported, a message for each reason; empty where it can be.

    Arithmetic on the architecture, so that a run with `export_hf` can be told before it starts. What only some readers
    of an export do not take is in `readers.py`.
    """
    reasons = []
    if not _computes_sigmoids(model.moe_router_score_function):
        reasons.append(
            f"moe_router_score_function={model.moe_router_score_function!r}: config.json cannot express its affinities "
            f"for a model of type {MODEL_TYPE!r}, which transformers computes as a {SCORING_FUNC} of the logits; the "
            "weights would be read as another model. Keep the checkpoint in this library's format (dsv3 generate "
            f"and dsv3 evaluate read it), or train with moe_router_score_function={SCORING_FUNC!r}")
    if model.moe_router_num_groups > 1:
        summed = model.moe_router_group_score_topk or model.moe_router_topk // model.moe_router_group_topk
        if summed != _GROUP_SCORE_TOPK:
            given = ("" if model.moe_router_group_score_topk else
                     f" (topk / group_topk = {model.moe_router_topk} / {model.moe_router_group_topk})")
            reasons.append(
                f"moe_router_group_score_topk={summed}{given}: transformers, vLLM and DeepSeek's code score a group by "
                f"its {_GROUP_SCORE_TOPK} best experts, would keep other groups and compute other logits; train with "
                f"moe_router_group_score_topk={_GROUP_SCORE_TOPK}")
        if model.moe_router_group_mask != "exclude":
            reasons.append(f"moe_router_group_mask={model.moe_router_group_mask!r}: config.json has no setting for it, "
                           "and present readers exclude the experts of other groups; train with "
                           "moe_router_group_mask='exclude'")
    if model.latent_epsilon != _LATENT_EPSILON:
        given = "layernorm_epsilon" if model.latent_layernorm_epsilon is None else "latent_layernorm_epsilon"
        reasons.append(f"{given}={model.latent_epsilon}: config.json has no setting for the epsilon of the latents' "
                       f"norms, which is {_LATENT_EPSILON} in transformers and DeepSeek's code; train with "
                       f"latent_layernorm_epsilon={_LATENT_EPSILON}")
    try:
        rope_scaling(model)
    except CheckpointError as error:
        reasons.append(str(error))
    return reasons


def _computes_sigmoids(score_function: str) -> bool:
    """Whether the affinities of that name are sigmoids of the logits: they are looked at, the name says little."""
    import torch  # what asks before a run starts asks without it where there is no export

    from dsv3_megatron.ops.router_scores import router_scores

    logits_E = torch.linspace(-6, 6, 16, dtype=torch.float64)
    return torch.allclose(router_scores(logits_E, score_function), 1 / (1 + (-logits_E).exp()), rtol=1e-12, atol=0)


def check_quantization(config: dict[str, Any], source: str = "config.json") -> bool:
    """Whether the file says that matrices are block-wise FP8.

    Raises:
        CheckpointError: the matrices are quantized in another way.
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
    return typed_number(name, value, name in _FLOATS, source)


def _check_derived(config: dict[str, Any], values: dict[str, Any], source: str) -> None:
    """Settings that repeat others."""
    heads, rope = values["num_attention_heads"], values["qk_rope_head_dim"]
    expected = {"num_key_value_heads": ((heads, None), "num_attention_heads"),
                "qk_head_dim": ((values["qk_nope_head_dim"] + rope,), "qk_nope_head_dim + qk_rope_head_dim"),
                "head_dim": ((rope, None), "qk_rope_head_dim")}
    for name, (allowed, meaning) in expected.items():
        if name in config and config[name] not in allowed:
            raise CheckpointError(f"{source}: {name}={config[name]!r} contradicts {meaning}={allowed[0]}")
