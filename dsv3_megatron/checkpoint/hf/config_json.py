"""The `config.json` of an exported model, and what a model must be so that it can be written.

`config/family_json.py` reads such a file.
"""

from __future__ import annotations

from typing import Any

from dsv3_megatron.checkpoint.folder import CheckpointError
from dsv3_megatron.config.family_json import FIELDS, FIXED, GROUP_SCORE_TOPK, LATENT_EPSILON, MODEL_TYPE, SCORING_FUNC
from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.config.rotary_settings import rope_scaling

# What the published checkpoint says of its FP8 weights.
QUANTIZATION = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}

_WRITTEN_FIXED = ("hidden_act", "attention_bias", "tie_word_embeddings", "topk_method", "norm_topk_prob",
                  "moe_layer_freq", "rope_interleave")
_WRITTEN_BESIDE = {"scoring_func": SCORING_FUNC, "attention_dropout": 0.0, "use_cache": True}


def model_config_to_json(model: ModelConfig, *, dtype: str, is_fp8: bool = False, bos_token_id: int | None = None,
                         eos_token_id: int | None = None, pad_token_id: int | None = None) -> dict[str, Any]:
    """The `config.json` of a model, in the published checkpoint's spelling, which `transformers` reads too.

    `config/family_json.py` reads the same ModelConfig from it, up to YaRN's fields where `rope_type` is "rope".

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
    content |= {name: getattr(model, field) for name, field in FIELDS.items()}
    content |= {name: FIXED[name][0] for name in _WRITTEN_FIXED} | _WRITTEN_BESIDE
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
        if summed != GROUP_SCORE_TOPK:
            given = ("" if model.moe_router_group_score_topk else
                     f" (topk / group_topk = {model.moe_router_topk} / {model.moe_router_group_topk})")
            reasons.append(
                f"moe_router_group_score_topk={summed}{given}: transformers, vLLM and DeepSeek's code score a group by "
                f"its {GROUP_SCORE_TOPK} best experts, would keep other groups and compute other logits; train with "
                f"moe_router_group_score_topk={GROUP_SCORE_TOPK}")
        if model.moe_router_group_mask != "exclude":
            reasons.append(f"moe_router_group_mask={model.moe_router_group_mask!r}: config.json has no setting for it, "
                           "and present readers exclude the experts of other groups; train with "
                           "moe_router_group_mask='exclude'")
    if model.latent_epsilon != LATENT_EPSILON:
        given = "layernorm_epsilon" if model.latent_layernorm_epsilon is None else "latent_layernorm_epsilon"
        reasons.append(f"{given}={model.latent_epsilon}: config.json has no setting for the epsilon of the latents' "
                       f"norms, which is {LATENT_EPSILON} in transformers and DeepSeek's code; train with "
                       f"latent_layernorm_epsilon={LATENT_EPSILON}")
    try:
        rope_scaling(model)
    except ConfigError as error:
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
