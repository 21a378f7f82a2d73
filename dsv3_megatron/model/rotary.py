"""Rotary position tables of MLA's decoupled keys and queries, and the softmax scale that belongs to them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.models.common.embeddings import RotaryEmbedding, YarnRotaryEmbedding
from megatron.core.transformer.multi_latent_attention import MultiLatentAttention
from megatron.core.transformer.transformer_config import MLATransformerConfig

from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.ops.backend import wide_dtype
from dsv3_megatron.ops.rotary_frequencies import plain_frequencies, yarn_frequencies


def softmax_scale(config: MLATransformerConfig) -> float:
    """1/sqrt(192) for plain RoPE; times (0.1 mscale_all_dim ln s + 1)^2 under YaRN.

    Source: DeepSeek-V3 report, eq. 10 and section 4.3; the squared factor is in the published code.
    """
    scale = 1.0 / math.sqrt(config.qk_head_dim + config.qk_pos_emb_head_dim)
    if config.rope_type == "yarn":
        factor = _magnitude(config.rotary_scaling_factor, config.mscale_all_dim)
        scale *= factor * factor
    return scale


def inverse_frequencies(config: MLATransformerConfig) -> torch.Tensor:
    """Radians per token of each rotated pair, fp64 [D/2]; D is qk_rope_head_dim.

    Plain ones or YaRN's, by the configuration: `ops/rotary_frequencies.py`.
    """
    dim, base = config.qk_pos_emb_head_dim, config.rotary_base
    if config.rope_type != "yarn":
        return plain_frequencies(dim, base)
    return yarn_frequencies(
        dim, base, factor=config.rotary_scaling_factor, original_length=config.original_max_position_embeddings,
        beta_fast=config.beta_fast, beta_slow=config.beta_slow)


def rotary_fields(model: ModelConfig) -> dict[str, Any]:
    """Megatron-Core's names and values for the rotary embedding of a model.

    Megatron-Core applies YaRN's softmax factor under plain RoPE too unless mscale_all_dim is 0.
    """
    is_yarn = model.rope_type == "yarn"
    return {
        "rope_type": model.rope_type, "rotary_base": model.rotary_base,
        "rotary_scaling_factor": model.rotary_scaling_factor,
        "original_max_position_embeddings": model.original_max_position_embeddings, "beta_fast": model.beta_fast,
        "beta_slow": model.beta_slow, "mscale": model.mscale if is_yarn else 1.0,
        "mscale_all_dim": model.mscale_all_dim if is_yarn else 0.0}


def change_context(chunks: Iterable[torch.nn.Module], model: ModelConfig) -> None:
    """Give every latent attention of these stages the rotary frequencies and softmax scale of `model`, in place.

    Neither has weights, so that a run goes on with another context length as if its model had been built for it.

    Args:
        chunks: Stages, wrapped or not, of local or of Transformer Engine's modules.
        model: An architecture that differs from the stages' in its rotary embedding at most.
    """
    fields = rotary_fields(model)
    for chunk in chunks:
        modules: list[Any] = list(chunk.modules())
        for attention in modules:
            is_local = isinstance(getattr(attention, "rotary", None), RotaryTables)
            if not is_local and not isinstance(attention, MultiLatentAttention):
                continue
            config = attention.config
            for name, value in fields.items():
                setattr(config, name, value)
            if is_local:
                attention.rotary = RotaryTables(config)
            else:
                attention.rotary_pos_emb = _engine_rotary(config, attention.pg_collection.cp)
            # Transformer Engine's attention has backends, each with a scale of its own.
            for part in attention.modules():
                if hasattr(part, "softmax_scale"):
                    part.softmax_scale = softmax_scale(config)


def _engine_rotary(config: MLATransformerConfig, cp_group: Any) -> torch.nn.Module:
    """What Megatron-Core's latent attention makes of its configuration when it is built."""
    if config.rope_type == "rope":
        return RotaryEmbedding(config.qk_pos_emb_head_dim, rotary_percent=config.rotary_percent,
                               rotary_base=config.rotary_base, cp_group=cp_group)
    return YarnRotaryEmbedding(
        config.qk_pos_emb_head_dim, rotary_base=config.rotary_base, scaling_factor=config.rotary_scaling_factor,
        original_max_position_embeddings=config.original_max_position_embeddings, beta_fast=config.beta_fast,
        beta_slow=config.beta_slow, mscale=config.mscale, mscale_all_dim=config.mscale_all_dim, cp_group=cp_group)


class RotaryTables:
    """cos and sin of every position and pair, made once for the longest sequence seen.

    Angles are computed in fp64: in fp32 they would be off by thousandths of a radian beyond 100,000 positions.
    """

    def __init__(self, config: MLATransformerConfig) -> None:
        self.config = config
        # No positions yet: the first call sees that it needs more, and knows the device. Named, since a model may be
        # built on the meta device, where a table could not be filled.
        self._cos_SP = self._sin_SP = torch.empty(0, 0, device="cpu")

    def __call__(self, length: int, like: torch.Tensor, position_ids_BS: torch.Tensor | None = None
                 ) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of each position and pair, times YaRN's multiplier.

        Args:
            length: Positions of a sequence.
            like: Tensor whose device the result is on; the result is fp64 if it is, else fp32.
            position_ids_BS: Positions of each sequence, below `length`: where they restart at each document. None is
                0 .. length - 1 in all of them.

        Returns:
            [length, D/2], or [length, B, D/2] by position ids.
        """
        dtype = wide_dtype(like.dtype)
        if self._cos_SP.shape[0] < length or self._cos_SP.device != like.device or self._cos_SP.dtype != dtype:
            config = self.config
            positions = torch.arange(length, dtype=torch.float64, device="cpu")
            angles_SP = torch.outer(positions, inverse_frequencies(config))
            magnitude = 1.0
            if config.rope_type == "yarn":
                magnitude = (_magnitude(config.rotary_scaling_factor, config.mscale)
                             / _magnitude(config.rotary_scaling_factor, config.mscale_all_dim))
            self._cos_SP = (angles_SP.cos() * magnitude).to(like.device, dtype)
            self._sin_SP = (angles_SP.sin() * magnitude).to(like.device, dtype)
        if position_ids_BS is not None:
            return self._cos_SP[position_ids_BS.T], self._sin_SP[position_ids_BS.T]
        return self._cos_SP[:length], self._sin_SP[:length]


def _magnitude(scaling_factor: float, mscale: float) -> float:
    """YaRN's attention temperature term, sqrt(1/t) = 0.1 mscale ln s + 1."""
    return 1.0 if scaling_factor <= 1 else 0.1 * mscale * math.log(scaling_factor) + 1.0
