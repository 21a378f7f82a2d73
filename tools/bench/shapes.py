"""The shapes that benchmarks measure: those of named presets, not made-up ones."""

from __future__ import annotations

from dataclasses import dataclass

from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.config.presets import dsv3_671b, laptop


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


def product_shapes(model: ModelConfig) -> list[ProductShape]:
    """Every distinct product of a model with a query latent, in the order a token meets them."""
    assert model.q_lora_rank is not None, "the benchmarked models have a query latent"
    hidden, heads, expert = model.hidden_size, model.num_attention_heads, model.moe_ffn_hidden_size
    return [
        ProductShape("q_down", model.q_lora_rank, hidden),
        ProductShape("q_up", heads * (model.qk_nope_head_dim + model.qk_rope_head_dim), model.q_lora_rank),
        ProductShape("kv_down", model.kv_lora_rank + model.qk_rope_head_dim, hidden),
        ProductShape("kv_up", heads * (model.qk_nope_head_dim + model.v_head_dim), model.kv_lora_rank),
        ProductShape("attention_out", hidden, heads * model.v_head_dim),
        ProductShape("dense_gate_up", 2 * model.ffn_hidden_size, hidden),
        ProductShape("dense_down", hidden, model.ffn_hidden_size),
        ProductShape("expert_gate_up", 2 * expert, hidden),
        ProductShape("expert_down", hidden, expert),
        ProductShape("head", model.vocab_size, hidden),
    ]


def attention_shape(model: ModelConfig, seq_length: int) -> AttentionShape:
    """Core attention at a sequence length."""
    width = model.qk_nope_head_dim + model.qk_rope_head_dim
    return AttentionShape(model.num_attention_heads, width, model.v_head_dim, seq_length)
