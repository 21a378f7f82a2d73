"""Published models of DeepSeek-V3's architecture: their `config.json`, and the same with small widths and weights.

Numbers are those of the files at huggingface.co: moonshotai/Moonlight-16B-A3B, moonshotai/Kimi-K2-Base and
deepseek-ai/DeepSeek-V3.1. What says nothing of the model (architectures, tokens, versions) is left out.
"""

from __future__ import annotations

from typing import Any

import torch

from dsv3_megatron.certification.reference_weights import Weights
from dsv3_megatron.config.family_json import model_config_from_json
from tests.hugging_face import published_weights, quantized

_COMMON: dict[str, Any] = {
    "attention_bias": False, "hidden_act": "silu", "kv_lora_rank": 512, "moe_layer_freq": 1, "norm_topk_prob": True,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "scoring_func": "sigmoid",
    "topk_method": "noaux_tc", "tie_word_embeddings": False, "torch_dtype": "bfloat16", "initializer_range": 0.02}
_FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
_YARN = {"beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096, "type": "yarn"}

FAMILY: dict[str, dict[str, Any]] = {
    "moonlight-16b": {
        **_COMMON, "model_type": "deepseek_v3", "hidden_size": 2048, "intermediate_size": 11264,
        "moe_intermediate_size": 1408, "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16,
        "n_shared_experts": 2, "n_routed_experts": 64, "routed_scaling_factor": 2.446, "q_lora_rank": None,
        "n_group": 1, "topk_group": 1, "num_experts_per_tok": 6, "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 0, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 50000.0,
        "vocab_size": 163840},
    "kimi-k2": {
        **_COMMON, "model_type": "kimi_k2", "hidden_size": 7168, "intermediate_size": 18432,
        "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 64, "num_key_value_heads": 64,
        "n_shared_experts": 1, "n_routed_experts": 384, "routed_scaling_factor": 2.827, "q_lora_rank": 1536,
        "n_group": 1, "topk_group": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 0, "max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "rope_theta": 50000.0,
        "rope_scaling": {**_YARN, "beta_fast": 1.0, "factor": 32.0}, "vocab_size": 163840,
        "quantization_config": _FP8},
    "deepseek-v3.1": {
        **_COMMON, "model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432,
        "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128,
        "num_key_value_heads": 128, "n_shared_experts": 1, "n_routed_experts": 256, "routed_scaling_factor": 2.5,
        "q_lora_rank": 1536, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8, "first_k_dense_replace": 3,
        "num_nextn_predict_layers": 1, "max_position_embeddings": 163840, "rms_norm_eps": 1e-6, "rope_theta": 10000,
        "rope_scaling": {**_YARN, "beta_fast": 32, "factor": 40}, "vocab_size": 129280,
        "quantization_config": {**_FP8, "scale_fmt": "ue8m0"}},
}
# Widths that are all different; what a model is known by (experts, groups, factors, norms, betas) stays.
_SMALL = {"hidden_size": 32, "intermediate_size": 40, "moe_intermediate_size": 16, "num_hidden_layers": 3,
          "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 12, "qk_nope_head_dim": 10,
          "qk_rope_head_dim": 8, "v_head_dim": 6, "vocab_size": 48, "first_k_dense_replace": 1}


def small_config(name: str) -> dict[str, Any]:
    """The `config.json` of a model with small widths, and a short context before YaRN's extension."""
    content = FAMILY[name] | _SMALL
    if content["q_lora_rank"]:
        content["q_lora_rank"] = 20
    if "rope_scaling" in content:
        content["rope_scaling"] = content["rope_scaling"] | {"original_max_position_embeddings": 16}
        content["rope_theta"] = 50.0
    return content


def small_folder(name: str) -> tuple[dict[str, Any], Weights]:
    """A small model's `config.json` and tensors as its makers store them."""
    content = small_config(name)
    model = model_config_from_json(content)
    weights = published_weights(model)
    if "quantization_config" in content:
        weights = quantized(weights)
    if content.get("quantization_config", {}).get("scale_fmt") == "ue8m0":
        weights = {key: torch.exp2(value.log2().round()) if key.endswith("_scale_inv") else value
                   for key, value in weights.items()}
    if name == "moonlight-16b":
        for layer in range(model.num_layers):
            weights[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.tensor(
                [model.rotary_base ** (-2 * pair / model.qk_rope_head_dim) for pair in range(4)])
    return content, weights
