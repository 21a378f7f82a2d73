"""Hugging Face checkpoints for tests, written with the safetensors package and nothing of ours.

FP8 is made with plain loops over blocks and scales that are no function of the values, as published ones are not.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dsv3_megatron.certification.reference_weights import Architecture, Weights, is_router_bias, random_weights

QUANTIZED = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj",
             "down_proj")
BLOCK = 128


def config_json(config: object, **changes: Any) -> dict[str, Any]:
    """`config.json` as published for DeepSeek-V3, with this architecture's numbers."""
    arch = Architecture.of(config)
    content: dict[str, Any] = {
        "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "bos_token_id": 0, "eos_token_id": 1,
        "ep_size": 1, "first_k_dense_replace": arch.num_dense_layers, "hidden_act": "silu",
        "hidden_size": arch.hidden_size, "initializer_range": 0.02, "intermediate_size": arch.ffn_hidden_size,
        "kv_lora_rank": arch.kv_lora_rank, "max_position_embeddings": 163840, "model_type": "deepseek_v3",
        "moe_intermediate_size": arch.moe_ffn_hidden_size, "moe_layer_freq": 1, "n_group": arch.moe_router_num_groups,
        "n_routed_experts": arch.num_experts, "n_shared_experts": arch.num_shared_experts, "norm_topk_prob": True,
        "num_attention_heads": arch.num_attention_heads, "num_experts_per_tok": arch.moe_router_topk,
        "num_hidden_layers": arch.num_layers, "num_key_value_heads": arch.num_attention_heads,
        "num_nextn_predict_layers": arch.mtp_num_layers, "q_lora_rank": arch.q_lora_rank,
        "qk_nope_head_dim": arch.qk_nope_head_dim, "qk_rope_head_dim": arch.qk_rope_head_dim, "rms_norm_eps": 1e-06,
        "rope_scaling": None, "rope_theta": 10000, "routed_scaling_factor": arch.moe_router_topk_scaling_factor,
        "scoring_func": "sigmoid", "tie_word_embeddings": False, "topk_group": arch.moe_router_group_topk,
        "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "transformers_version": "4.33.1", "use_cache": True,
        "v_head_dim": arch.v_head_dim, "vocab_size": arch.vocab_size}
    if arch.rope_type == "yarn":
        content["rope_scaling"] = {
            "beta_fast": arch.beta_fast, "beta_slow": arch.beta_slow, "factor": arch.rotary_scaling_factor,
            "mscale": arch.mscale, "mscale_all_dim": arch.mscale_all_dim,
            "original_max_position_embeddings": arch.original_max_position_embeddings, "type": "yarn"}
        content["rope_theta"] = arch.rotary_base
    return content | changes


def published_weights(config: object, dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> Weights:
    """Random weights with an MTP module's stored copies of embedding and head, router biases in FP32."""
    arch = Architecture.of(config)
    weights = {name: value.float() if is_router_bias(name) else value.to(dtype)
               for name, value in random_weights(arch, seed).items()}
    for layer in range(arch.num_layers, arch.num_layers + arch.mtp_num_layers):
        weights[f"model.layers.{layer}.embed_tokens.weight"] = weights["model.embed_tokens.weight"].clone()
        weights[f"model.layers.{layer}.shared_head.head.weight"] = weights["lm_head.weight"].clone()
    return weights


def quantized(weights: Weights, seed: int = 1) -> Weights:
    """The weights with every matrix in FP8: random values of every kind, and scales of no pattern."""
    stream = torch.Generator().manual_seed(seed)
    result: Weights = {}
    for name, value in weights.items():
        if value.ndim != 2 or not any(f"{part}.weight" in name for part in QUANTIZED):
            result[name] = value
            continue
        raw = torch.randint(0, 256, value.shape, generator=stream, dtype=torch.uint8)
        raw[(raw & 0x7F) == 0x7F] = 0  # NaN
        result[name] = raw.view(torch.float8_e4m3fn)
        blocks = (math.ceil(value.shape[0] / BLOCK), math.ceil(value.shape[1] / BLOCK))
        result[name + "_scale_inv"] = torch.exp(torch.randn(blocks, generator=stream) * 3 - 9)
    return result


def dequantized(weights: Weights, dtype: torch.dtype = torch.bfloat16) -> Weights:
    """The values that a quantized dict stands for, block by block: FP32 product, rounded to `dtype`."""
    result: Weights = {}
    for name, value in weights.items():
        if name.endswith("_scale_inv"):
            continue
        if value.dtype != torch.float8_e4m3fn:
            result[name] = value
            continue
        scales, wide = weights[name + "_scale_inv"], value.float()
        for row in range(scales.shape[0]):
            for column in range(scales.shape[1]):
                wide[row * BLOCK: (row + 1) * BLOCK, column * BLOCK: (column + 1) * BLOCK] *= scales[row, column]
        result[name] = wide.to(dtype)
    return result


def write_checkpoint(folder: Path, config: dict[str, Any], weights: Weights, num_shards: int = 3) -> Path:
    """A checkpoint of `num_shards` files with an index, tensors dealt out in turn; 0: one file without an index."""
    folder.mkdir(parents=True)
    if any(value.dtype == torch.float8_e4m3fn for value in weights.values()):
        config = {"quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                                          "weight_block_size": [128, 128]}, **config}
    (folder / "config.json").write_text(json.dumps(config))
    if not num_shards:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    files = [f"model-{number + 1:05d}-of-{num_shards:06d}.safetensors" for number in range(num_shards)]
    weight_map = {name: files[position % num_shards] for position, name in enumerate(weights)}
    for file in files:
        save_file({name: weights[name] for name, where in weight_map.items() if where == file}, folder / file,
                  metadata={"format": "pt"})
    size = sum(value.numel() * value.element_size() for value in weights.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}))
    return folder
