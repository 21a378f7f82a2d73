"""The shapes that benchmarks measure: those of named presets, not made-up ones."""

from __future__ import annotations

from dataclasses import dataclass

from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.config.presets import dsv3_671b, laptop
from dsv3_megatron.config.weights import IN_LAYERS, Fp8, Place, weights_at


@dataclass(frozen=True)
class ProductShape:
    """One linear layer: y [tokens, num_outputs] = x [tokens, num_inputs] W^T."""

    name: str
    num_outputs: int
    num_inputs: int


@dataclass(frozen=True)
class AttentionShape:
    """Core attention of one layer."""

    num_heads: int
    query_width: int
    value_width: int
    seq_length: int


LAPTOP: ModelConfig = laptop().model
V3: ModelConfig = dsv3_671b().model


# Names that the benchmarks' rows have had for modules, from their first results on.
_NAMES = {
    "self_attention.linear_q_down_proj": "q_down", "self_attention.linear_q_up_proj": "q_up",
    "self_attention.linear_kv_down_proj": "kv_down", "self_attention.linear_kv_up_proj": "kv_up",
    "self_attention.linear_proj": "attention_out", "mlp.linear_fc1": "dense_gate_up", "mlp.linear_fc2": "dense_down",
    "mlp.experts.linear_fc1": "expert_gate_up", "mlp.experts.linear_fc2": "expert_down", "output_layer": "head",
}


def product_shapes(model: ModelConfig) -> list[ProductShape]:
    """Every product of a model that FP8 computes, in the order a token meets them, and the head's.

    Those of shared experts are left out: their shapes are an expert's, as many times wider as they are several.
    """
    weights = [weight for weight in weights_at(model, *IN_LAYERS)
               if weight.fp8 is Fp8.AS_PUBLISHED and weight.component != "shared_experts"]
    return [ProductShape(_NAMES.get(weight.module, weight.module), *weight.shape(model))
            for weight in (*weights, *weights_at(model, Place.HEAD))]


def attention_shape(model: ModelConfig, seq_length: int) -> AttentionShape:
    """Core attention at a sequence length."""
    width = model.qk_nope_head_dim + model.qk_rope_head_dim
    return AttentionShape(model.num_attention_heads, width, model.v_head_dim, seq_length)
