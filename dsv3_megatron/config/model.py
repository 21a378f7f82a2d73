"""The architecture of a DeepSeek-V3-style model: widths, counts, routing, rotary embedding.

Plain frozen data, no torch. Field names are DeepSeek's for the MLA widths and Megatron-Core's
(`--num-experts`, `--moe-router-topk`) for the rest; `model/mcore_config.py` is the only place that
translates them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from functools import partial
from typing import Any

from dsv3_megatron.config.fields import ConfigError, InPhases, all_divisors, nearest, option, require_finite
from dsv3_megatron.config.router_functions import SCORE_FUNCTIONS

ROPE_TYPES = ("rope", "yarn")
GROUP_MASKS = ("exclude", "zero")

# Fields that a later phase of a run may change, since no weight has a shape of them: long-context extension, and the
# initial weights, which a checkpoint replaces.
_MAY_CHANGE = frozenset({
    "max_position_embeddings", "rope_type", "rotary_scaling_factor", "original_max_position_embeddings", "beta_fast",
    "beta_slow", "mscale", "mscale_all_dim", "init_method_std"})

# Everything that looks at a model looks at each of its layers.
MAX_LAYERS = 2000
MAX_EXPERTS, MAX_HEADS = 1 << 16, 1 << 16


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of one model. Defaults of the switches are DeepSeek-V3's.

    Source: DeepSeek-V3 report, sections 2.1, 2.2 and 4.2, and the published `config.json`.
    """

    num_layers: int = option(most=MAX_LAYERS, help="transformer layers, MTP modules not counted")
    hidden_size: int = option(help="width of the residual stream")
    num_attention_heads: int = option(most=MAX_HEADS, help="attention heads")
    kv_lora_rank: int = option(help="width of the compressed key/value latent")
    qk_nope_head_dim: int = option(help="per-head width of query and key without rotary embedding")
    qk_rope_head_dim: int = option(help="per-head width of the rotary part; the key's is shared by all heads")
    v_head_dim: int = option(help="per-head width of the value")
    ffn_hidden_size: int = option(help="intermediate width of the dense layers' SwiGLU")
    num_experts: int = option(most=MAX_EXPERTS, help="routed experts in each MoE layer")
    moe_ffn_hidden_size: int = option(help="intermediate width of one expert")
    moe_router_topk: int = option(help="routed experts each token goes to")
    vocab_size: int = option(help="rows of the embedding and of the output head")
    q_lora_rank: int | None = option(None, help="width of the compressed query latent; none: full-rank queries")
    num_dense_layers: int = option(1, help="leading layers with a dense FFN instead of experts")
    num_shared_experts: int = option(1, help="experts that every token goes to")
    moe_router_num_groups: int = option(1, help="groups of experts for node-limited routing")
    moe_router_group_topk: int = option(1, help="groups a token may go to")
    moe_router_group_score_topk: int | None = option(
        None, help="best experts summed to a group's score; none: topk / group_topk, as in the report; 2: as "
        "Transformers and DeepSeek's code do whatever the other two are")
    moe_router_group_mask: str = option(
        "exclude", choices=GROUP_MASKS, help="experts of the other groups: exclude them, or rank them with affinity 0, "
        "as Transformers did until 2026; the two differ where biases make affinities negative")
    moe_router_score_function: str = option(
        "sigmoid", choices=SCORE_FUNCTIONS, help="affinities of the router's logits: V3's sigmoid, or softmax over all "
        "experts, which no Hugging Face export can express")
    moe_router_topk_scaling_factor: float = option(2.5, help="factor on the normalised gates")
    mtp_num_layers: int = option(1, most=1000, help="multi-token-prediction modules (depth D); 0: none")
    max_position_embeddings: int = option(
        4096, in_phases=InPhases.CHANGED, help="longest sequence the model is meant for, in tokens")
    rotary_base: float = option(10000.0, help="base of the rotary frequencies (theta)")
    rope_type: str = option(
        "rope", in_phases=InPhases.CHANGED, choices=ROPE_TYPES, help="plain rotary embedding, or YaRN for long context")
    rotary_scaling_factor: float = option(1.0, in_phases=InPhases.CHANGED, help="YaRN: context extension factor s")
    original_max_position_embeddings: int = option(
        4096, in_phases=InPhases.CHANGED, help="YaRN: context length before the extension")
    beta_fast: float = option(32.0, in_phases=InPhases.CHANGED, help="YaRN: rotations above which a frequency is kept")
    beta_slow: float = option(
        1.0, in_phases=InPhases.CHANGED, help="YaRN: rotations below which a frequency is interpolated")
    mscale: float = option(1.0, in_phases=InPhases.CHANGED, help="YaRN: numerator of the cos/sin multiplier")
    mscale_all_dim: float = option(
        1.0, in_phases=InPhases.CHANGED, help="YaRN: its denominator, and the softmax scale's exponent base")
    layernorm_epsilon: float = option(1e-6, flag="norm-epsilon", help="epsilon of every RMSNorm")
    latent_layernorm_epsilon: float | None = option(
        None, flag="latent-norm-epsilon", help="epsilon of the query and key/value latents' norms; none: as of every "
        "other; Transformers and DeepSeek's code have 1e-6 whatever the others have")
    init_method_std: float = option(0.006, help="standard deviation of the initial weights")

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key head, rotary part included."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_epsilon(self) -> float:
        """Epsilon of the latents' norms."""
        return self.layernorm_epsilon if self.latent_layernorm_epsilon is None else self.latent_layernorm_epsilon

    @property
    def num_moe_layers(self) -> int:
        """MoE layers of the main model, MTP modules not counted."""
        return self.num_layers - self.num_dense_layers

    def validate(self) -> None:
        """Check the rules that involve the architecture alone.

        Raises:
            ConfigError: one message with the rule, the values, the field and the way out.
        """
        require_finite(self)
        for name in ("num_layers", "hidden_size", "num_attention_heads", "kv_lora_rank", "qk_nope_head_dim",
                     "qk_rope_head_dim", "v_head_dim", "ffn_hidden_size", "num_experts", "moe_ffn_hidden_size",
                     "moe_router_topk", "vocab_size", "moe_router_num_groups", "moe_router_group_topk",
                     "max_position_embeddings", "original_max_position_embeddings"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("num_dense_layers", "num_shared_experts", "mtp_num_layers"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} must not be negative")
        for name in ("moe_router_topk_scaling_factor", "rotary_base", "beta_fast", "beta_slow", "layernorm_epsilon",
                     "init_method_std"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be greater than 0")
        if self.latent_epsilon <= 0:
            raise ConfigError(f"latent_layernorm_epsilon={self.latent_epsilon} must be greater than 0; leave it out "
                              "for layernorm_epsilon")
        if self.q_lora_rank is not None and self.q_lora_rank < 1:
            raise ConfigError(f"q_lora_rank={self.q_lora_rank} must be at least 1; leave it out for full-rank queries")
        if self.qk_rope_head_dim % 2:
            raise ConfigError(f"qk_rope_head_dim={self.qk_rope_head_dim} must be even: rotary embedding turns pairs")
        if self.num_dense_layers > self.num_layers:
            raise ConfigError(
                f"num_dense_layers={self.num_dense_layers} must not exceed num_layers={self.num_layers}"
            )
        if self.rope_type not in ROPE_TYPES:
            raise ConfigError(f"rope_type={self.rope_type!r} must be one of {', '.join(ROPE_TYPES)}")
        if self.rotary_base <= 1:
            raise ConfigError(f"rotary_base={self.rotary_base} must be greater than 1: the frequencies of the pairs "
                              "are its negative powers")
        self._validate_yarn()
        self._validate_routing()

    def _validate_yarn(self) -> None:
        if self.rope_type != "yarn":
            return
        if self.rotary_scaling_factor < 1:
            raise ConfigError(f"rotary_scaling_factor={self.rotary_scaling_factor} must be at least 1: YaRN extends "
                              "the context by this factor")
        for name in ("mscale", "mscale_all_dim"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} must not be negative; 0 turns it off")
        if self.beta_fast < self.beta_slow:
            raise ConfigError(f"beta_fast={self.beta_fast} must not be below beta_slow={self.beta_slow}: frequencies "
                              "above the one are kept, below the other interpolated")

    def _routes(self, name: str, value: int) -> bool:
        """Whether tokens could be routed with another value of a field."""
        try:
            changes: dict[str, Any] = {name: value}
            replace(self, **changes)._validate_routing()
        except ConfigError:
            return False
        return True

    def _validate_routing(self) -> None:
        groups, kept = self.moe_router_num_groups, self.moe_router_group_topk
        if self.num_experts % groups:
            ways = nearest(all_divisors(self.num_experts), partial(self._routes, "moe_router_num_groups"), near=groups)
            raise ConfigError(
                f"moe_router_num_groups={groups} must divide num_experts={self.num_experts}; "
                + (f"try {ways}" if ways else "change num_experts, moe_router_topk or moe_router_group_topk too")
            )
        if kept > groups:
            raise ConfigError(
                f"moe_router_group_topk={kept} must not exceed moe_router_num_groups={groups}"
            )
        if self.moe_router_topk > self.num_experts:
            raise ConfigError(
                f"moe_router_topk={self.moe_router_topk} must not exceed num_experts={self.num_experts}"
            )
        reachable = self.num_experts // groups * kept
        if self.moe_router_topk > reachable:
            raise ConfigError(
                f"moe_router_topk={self.moe_router_topk} must not exceed the {reachable} experts in the "
                f"moe_router_group_topk={kept} groups a token may go to; keep more groups or choose fewer experts"
            )
        if self.moe_router_group_mask not in GROUP_MASKS:
            raise ConfigError(f"moe_router_group_mask={self.moe_router_group_mask!r} must be one of "
                              f"{', '.join(GROUP_MASKS)}")
        if self.moe_router_score_function not in SCORE_FUNCTIONS:
            raise ConfigError(f"moe_router_score_function={self.moe_router_score_function!r} must be one of "
                              f"{', '.join(SCORE_FUNCTIONS)}")
        summed = self.moe_router_group_score_topk
        if groups == 1:
            return
        if summed is None and self.moe_router_topk % kept:
            ways = nearest(all_divisors(self.moe_router_topk), near=kept,
                           is_accepted=partial(self._routes, "moe_router_group_topk"))
            raise ConfigError(
                f"moe_router_group_topk={kept} must divide moe_router_topk={self.moe_router_topk}: "
                "a group's score is the sum of its topk/group_topk best experts; "
                + (f"try {ways}, or set " if ways else "set ") + "moe_router_group_score_topk"
            )
        if summed is not None and not 1 <= summed <= self.num_experts // groups:
            raise ConfigError(
                f"moe_router_group_score_topk={summed} must lie in 1..{self.num_experts // groups}, the experts of a "
                f"group (num_experts={self.num_experts} in moe_router_num_groups={groups}); leave it out for "
                "topk / group_topk"
            )


def architecture_differences(stored: Mapping[str, Any], model: ModelConfig) -> list[str]:
    """The fields in which a checkpoint's architecture is not a model's, with both values.

    Args:
        stored: Fields of the checkpoint's architecture by name.
        model: The architecture that it is compared with.
    """
    mine = asdict(model)
    compared = [field.name for field in fields(ModelConfig) if field.name not in _MAY_CHANGE]
    # A field that the writing version did not have yet meant what it means by default.
    then = {field.name: field.default for field in fields(ModelConfig)
            if field.default is not MISSING} | dict(stored)
    differing = [f"{name}={mine[name]!r} (checkpoint: {then[name]!r})" for name in compared
                 if name in then and then[name] != mine[name]]
    return differing + [f"{name}, which this version does not know (checkpoint: {stored[name]!r})" for name in stored
                        if name not in mine]
