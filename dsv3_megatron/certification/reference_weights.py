"""The reference model's architecture and weights: every tensor's name, shape and a random value.

Names and shapes are those of the published checkpoint, so that a test can hand one dict to `reference.py`, to
Hugging Face's model and, translated, to ours. No Megatron-Core, nothing from dsv3_megatron.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, fields

import torch
from torch import Tensor

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Architecture:
    """The fields of a model's architecture that its mathematics depends on."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    ffn_hidden_size: int
    num_experts: int
    moe_ffn_hidden_size: int
    moe_router_topk: int
    vocab_size: int
    q_lora_rank: int | None = None
    num_dense_layers: int = 1
    num_shared_experts: int = 1
    moe_router_num_groups: int = 1
    moe_router_group_topk: int = 1
    moe_router_group_score_topk: int | None = None
    moe_router_group_mask: str = "exclude"
    moe_router_score_function: str = "sigmoid"
    moe_router_topk_scaling_factor: float = 2.5
    mtp_num_layers: int = 1
    rotary_base: float = 10000.0
    rope_type: str = "rope"
    rotary_scaling_factor: float = 1.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0
    layernorm_epsilon: float = 1e-6
    latent_layernorm_epsilon: float | None = None

    @classmethod
    def of(cls, config: object) -> Architecture:
        """Read the fields off any object that has attributes of these names."""
        if isinstance(config, cls):
            return config
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})

    def is_moe_layer(self, layer: int) -> bool:
        """Whether a layer, counted from 0, has experts; MTP module k is layer `num_layers + k`.

        An MTP module's block is of the kind of the last main layer, as in Megatron-Core.
        """
        return min(layer, self.num_layers - 1) >= self.num_dense_layers


def is_router_bias(name: str) -> bool:
    """Whether a weight is a router's balancing bias, which no gradient trains."""
    return name.endswith(".e_score_correction_bias")


def weight_shapes(config: object) -> dict[str, tuple[int, ...]]:
    """Every weight of the model under its checkpoint name, in the order of the forward pass.

    The checkpoint's copies of the embedding and the head inside an MTP module are left out: they are the main
    model's. Linear weights are [out, in].
    """
    arch = Architecture.of(config)
    hidden, vocab = arch.hidden_size, arch.vocab_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(arch.num_layers + arch.mtp_num_layers):
        prefix = f"model.layers.{layer}"
        if layer >= arch.num_layers:
            shapes[f"{prefix}.enorm.weight"] = (hidden,)
            shapes[f"{prefix}.hnorm.weight"] = (hidden,)
            shapes[f"{prefix}.eh_proj.weight"] = (hidden, 2 * hidden)
        shapes |= _block_shapes(arch, layer)
        if layer >= arch.num_layers:
            shapes[f"{prefix}.shared_head.norm.weight"] = (hidden,)
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def _block_shapes(arch: Architecture, layer: int) -> dict[str, tuple[int, ...]]:
    prefix, hidden, heads = f"model.layers.{layer}", arch.hidden_size, arch.num_attention_heads
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    q_width = heads * (arch.qk_nope_head_dim + arch.qk_rope_head_dim)
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}.input_layernorm.weight": (hidden,)}
    if arch.q_lora_rank is None:
        shapes[f"{attention}.q_proj.weight"] = (q_width, hidden)
    else:
        shapes[f"{attention}.q_a_proj.weight"] = (arch.q_lora_rank, hidden)
        shapes[f"{attention}.q_a_layernorm.weight"] = (arch.q_lora_rank,)
        shapes[f"{attention}.q_b_proj.weight"] = (q_width, arch.q_lora_rank)
    kv_width = heads * (arch.qk_nope_head_dim + arch.v_head_dim)
    shapes[f"{attention}.kv_a_proj_with_mqa.weight"] = (arch.kv_lora_rank + arch.qk_rope_head_dim, hidden)
    shapes[f"{attention}.kv_a_layernorm.weight"] = (arch.kv_lora_rank,)
    shapes[f"{attention}.kv_b_proj.weight"] = (kv_width, arch.kv_lora_rank)
    shapes[f"{attention}.o_proj.weight"] = (hidden, heads * arch.v_head_dim)
    shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
    if not arch.is_moe_layer(layer):
        return shapes | _swiglu_shapes(mlp, hidden, arch.ffn_hidden_size)
    shapes[f"{mlp}.gate.weight"] = (arch.num_experts, hidden)
    shapes[f"{mlp}.gate.e_score_correction_bias"] = (arch.num_experts,)
    for expert in range(arch.num_experts):
        shapes |= _swiglu_shapes(f"{mlp}.experts.{expert}", hidden, arch.moe_ffn_hidden_size)
    if arch.num_shared_experts > 0:
        width = arch.num_shared_experts * arch.moe_ffn_hidden_size
        shapes |= _swiglu_shapes(f"{mlp}.shared_experts", hidden, width)
    return shapes


def _swiglu_shapes(prefix: str, hidden: int, width: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.gate_proj.weight": (width, hidden),
        f"{prefix}.up_proj.weight": (width, hidden),
        f"{prefix}.down_proj.weight": (hidden, width),
    }


def random_weights(config: object, seed: int = 0, dtype: torch.dtype = torch.float64) -> Weights:
    """Weights far from any special value: norms around 1, router biases of the size of the scores' spread.

    Each tensor has a random stream of its own, from the seed and its name: models that differ in depth or in their
    experts share the rest, and a float32 dict is the float64 one rounded.
    """
    weights = {}
    for name, shape in weight_shapes(config).items():
        stream = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
        noise = torch.randn(shape, generator=stream, dtype=torch.float64)
        if is_router_bias(name):
            value = 0.1 * noise
        elif len(shape) == 1:
            value = 1.0 + 0.2 * noise
        elif name == "model.embed_tokens.weight":
            value = noise
        else:
            value = noise / math.sqrt(shape[1])
        weights[name] = value.to(dtype)
    return weights
