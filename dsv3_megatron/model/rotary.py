"""Rotary position tables of MLA's decoupled keys and queries, and the softmax scale that belongs to them."""

from __future__ import annotations

import math

import torch
from megatron.core.transformer.transformer_config import MLATransformerConfig

from dsv3_megatron.ops.backend import wide_dtype


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

    YaRN keeps frequencies that turn more than beta_fast times within the original context, divides by
    the extension factor those that turn less than beta_slow times, and blends linearly between the two.
    Source: YaRN, arXiv 2309.00071, section 3.2; DeepSeek-V3 report, section 4.3.
    """
    dim = config.qk_pos_emb_head_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim
    plain = 1.0 / (config.rotary_base ** exponents)
    if config.rope_type != "yarn":
        return plain

    def pair_that_turns(rotations: float) -> float:
        length = config.original_max_position_embeddings
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(config.rotary_base))

    low = max(math.floor(pair_that_turns(config.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(config.beta_slow)), dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float64, device="cpu") - low) / max(high - low, 0.001)
    interpolated_share = ramp.clamp(0, 1)
    return plain / config.rotary_scaling_factor * interpolated_share + plain * (1 - interpolated_share)


class RotaryTables:
    """cos and sin of every position and pair, made once for the longest sequence seen.

    Angles are computed in fp64: in fp32 they would be off by thousandths of a radian beyond 100,000 positions.
    """

    def __init__(self, config: MLATransformerConfig) -> None:
        self.config = config
        self._cos_SP = self._sin_SP = torch.empty(0, 0, device="cpu")

    def __call__(self, length: int, like: torch.Tensor, position_ids_BS: torch.Tensor | None = None
                 ) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of each position and pair, times YaRN's multiplier.

        Args:
            length: Positions of a sequence.
            like: On its device; fp64 if it is, else fp32.
            position_ids_BS: Of each sequence, below `length`: where they restart at each document. None is
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
