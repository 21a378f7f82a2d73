"""Small architectures in which every width is another number, so that a mix-up of two of them cannot pass."""

from __future__ import annotations

import dataclasses

from dsv3_megatron.certification.reference import Weights, random_weights
from dsv3_megatron.certification.reference_weights import is_router_bias
from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.config.parallel import ParallelConfig
from dsv3_megatron.config.presets import preset
from dsv3_megatron.config.run import RunConfig

BASE = ModelConfig(
    num_layers=3, num_dense_layers=1, hidden_size=32, num_attention_heads=4, q_lora_rank=20, kv_lora_rank=12,
    qk_nope_head_dim=10, qk_rope_head_dim=8, v_head_dim=6, ffn_hidden_size=40, num_experts=12, moe_ffn_hidden_size=16,
    moe_router_topk=4, num_shared_experts=1, mtp_num_layers=1, vocab_size=48, max_position_embeddings=256)
# Six candidates in the two groups that a token may go to, of which four are chosen.
GROUPED = {"moe_router_num_groups": 4, "moe_router_group_topk": 2}
# A short original context puts the YaRN ramp inside the four pairs of an 8-wide rotary part.
YARN = {"rope_type": "yarn", "rotary_scaling_factor": 40.0, "original_max_position_embeddings": 256,
        "rotary_base": 50.0}
VARIANTS = {
    "plain": {},
    "full-rank-query": {"q_lora_rank": None},
    "groups": GROUPED,
    "groups-keep-one": {"moe_router_num_groups": 2, "moe_router_group_topk": 1},
    "all-moe": {"num_dense_layers": 0, "moe_router_topk_scaling_factor": 1.5, **GROUPED},
    "all-dense": {"num_dense_layers": 3},
    "top-1": {"moe_router_topk": 1},
    "top-all": {"moe_router_topk": 12},
    "softmax": {"moe_router_score_function": "softmax", **GROUPED},
    "no-shared": {"num_shared_experts": 0},
    "two-shared": {"num_shared_experts": 2, **GROUPED},
    "yarn": YARN,
    "yarn-mscale": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2, "q_lora_rank": None},
    "no-mtp": {"mtp_num_layers": 0},
    "mtp-2": {"mtp_num_layers": 2},
    "mtp-2-groups": {"mtp_num_layers": 2, "num_shared_experts": 2, **GROUPED},
}
# Those that config.json can express.
PUBLISHED = [name for name in VARIANTS if name != "softmax"]
BALANCE_LOSS_ALPHA = 0.02  # large enough to be seen in the routers' gradients
MTP_LAMBDA = 0.3


def variant(name: str, **changes: object) -> ModelConfig:
    """The architecture called `name`, with more changes."""
    return dataclasses.replace(BASE, **{**VARIANTS[name], **changes})


def run_of(model: ModelConfig, parallel: ParallelConfig | None = None, **training: object) -> RunConfig:
    """A run of this architecture on local modules."""
    run = dataclasses.replace(preset("tiny"), model=model, parallel=parallel or ParallelConfig())
    return run.override(**{
        "transformer_impl": "local", "seq_length": 24, "moe_aux_loss_coeff": BALANCE_LOSS_ALPHA,
        "mtp_loss_scaling_factor": MTP_LAMBDA, **training})


def reference_weights(model: ModelConfig, seed: int = 1) -> Weights:
    """fp64 weights with router biases that fp32 holds exactly: ours stay fp32 in every precision."""
    weights = random_weights(model, seed)
    return {name: value.float().double() if is_router_bias(name) else value for name, value in weights.items()}
