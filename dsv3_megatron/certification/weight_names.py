"""Our global parameter names in the reference's (Hugging Face's) names, and the reference's weights in our modules.

A weight of ours is one of the reference's or two on top of each other: the gate and the up projection.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from dsv3_megatron.certification.reference import Weights
from dsv3_megatron.model.global_names import whole_parameters
from dsv3_megatron.optim.router_bias import routers

_OUTSIDE_LAYERS = {
    "embedding.word_embeddings.weight": ("model.embed_tokens.weight",),
    "decoder.final_layernorm.weight": ("model.norm.weight",),
    "output_layer.weight": ("lm_head.weight",),
}
_IN_LAYER = {
    "input_layernorm.weight": ("input_layernorm.weight",),
    "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight",),
    "self_attention.linear_q_proj.weight": ("self_attn.q_proj.weight",),
    "self_attention.linear_q_down_proj.weight": ("self_attn.q_a_proj.weight",),
    "self_attention.q_layernorm.weight": ("self_attn.q_a_layernorm.weight",),
    "self_attention.linear_q_up_proj.weight": ("self_attn.q_b_proj.weight",),
    "self_attention.linear_kv_down_proj.weight": ("self_attn.kv_a_proj_with_mqa.weight",),
    "self_attention.kv_layernorm.weight": ("self_attn.kv_a_layernorm.weight",),
    "self_attention.linear_kv_up_proj.weight": ("self_attn.kv_b_proj.weight",),
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight",),
    "mlp.router.weight": ("mlp.gate.weight",),
    "enorm.weight": ("enorm.weight",),
    "hnorm.weight": ("hnorm.weight",),
    "eh_proj.weight": ("eh_proj.weight",),
    "final_layernorm.weight": ("shared_head.norm.weight",),
}


def reference_names(name: str, num_layers: int) -> tuple[str, ...]:
    """The reference's weights that are, on top of each other, our parameter `name`.

    Args:
        name: Global name, as in `whole_parameters`.
        num_layers: Layers of the main model; MTP module k is the reference's layer num_layers + k.
    """
    if name in _OUTSIDE_LAYERS:
        return _OUTSIDE_LAYERS[name]
    layer = re.fullmatch(r"(decoder|mtp)\.layers\.(\d+)\.(?:mtp_model_layer\.)?(.+)", name)
    assert layer is not None, name
    index = int(layer.group(2)) + (num_layers if layer.group(1) == "mtp" else 0)
    inside = layer.group(3)
    ffn = re.fullmatch(r"(mlp(?:\.experts\.\d+|\.shared_experts)?)\.linear_fc([12])\.weight", inside)
    if ffn is not None:
        parts = ("gate_proj", "up_proj") if ffn.group(2) == "1" else ("down_proj",)
        return tuple(f"model.layers.{index}.{ffn.group(1)}.{part}.weight" for part in parts)
    return tuple(f"model.layers.{index}.{reference}" for reference in _IN_LAYER[inside])


def router_bias_name(row: int) -> str:
    """The reference's name of the router bias in row `row` of the load table."""
    return f"model.layers.{row}.mlp.gate.e_score_correction_bias"


def whole_from_reference(name: str, weights: Weights, num_layers: int) -> torch.Tensor:
    """Our whole parameter `name`, or its gradient, out of the reference's."""
    return torch.cat([weights[part] for part in reference_names(name, num_layers)])


def reference_from_whole(values: Mapping[str, torch.Tensor], biases: Mapping[int, torch.Tensor], num_layers: int
                         ) -> Weights:
    """The reference's weights, float64, out of our whole parameters by global name and router biases by row."""
    weights: Weights = {router_bias_name(row): bias.double() for row, bias in biases.items()}
    for name, value in values.items():
        parts = reference_names(name, num_layers)
        weights |= zip(parts, value.double().chunk(len(parts)), strict=True)
    return weights


def load_reference_weights(chunks: Iterable[torch.nn.Module], groups: Any, weights: Weights, num_layers: int) -> None:
    """Give this rank's stages the reference's weights and router biases, each rank its part."""
    chunks = list(chunks)
    with torch.no_grad():
        for chunk in chunks:
            for whole in whole_parameters(chunk, groups):
                full = whole_from_reference(whole.name, weights, num_layers)
                assert full.shape == whole.shape, (whole.name, full.shape, whole.shape)
                whole.local.copy_(whole.take(full))
        for row, router in routers(chunks, num_layers):
            router.expert_bias.copy_(weights[router_bias_name(row)])
