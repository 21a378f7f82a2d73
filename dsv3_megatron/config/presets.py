"""Named runs, one function each. A function says where its numbers come from; a variant mutates a base."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from dsv3_megatron.config.data import DataConfig
from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.config.parallel import ParallelConfig
from dsv3_megatron.config.phases import Phase
from dsv3_megatron.config.precision import Fp8Config
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.config.training import CheckpointConfig, LoggingConfig, TrainingConfig


def _run(name: str, model: ModelConfig, training: TrainingConfig, parallel: ParallelConfig | None = None,
         fp8: Fp8Config | None = None) -> RunConfig:
    return RunConfig(name, model, parallel or ParallelConfig(), training, DataConfig(), CheckpointConfig(),
                     LoggingConfig(), fp8=fp8 or Fp8Config())


def tiny() -> RunConfig:
    """The quickstart's model: every mechanism of V3 at a size that two CPU cores train in minutes.

    Widths keep V3's proportions roughly (rotary part half of the no-RoPE part, query latent wider
    than the key/value latent); counts are chosen so that PP2 x EP2 divides them. Groups are scored by two
    experts, not by topk / group_topk = 1: so do the programs that it is exported to. Vocabulary, batch,
    learning rate, initial width and bias step are chosen for a run of under a million tokens, in which the
    model has to beat a bigram model counted on the same tokens with room.
    """
    model = ModelConfig(
        num_layers=4, num_dense_layers=1, hidden_size=128, num_attention_heads=4, q_lora_rank=64, kv_lora_rank=32,
        qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, ffn_hidden_size=384, num_experts=8,
        moe_ffn_hidden_size=96, moe_router_topk=2, moe_router_num_groups=4, moe_router_group_topk=2,
        moe_router_group_score_topk=2, num_shared_experts=1, mtp_num_layers=1, vocab_size=2048,
        max_position_embeddings=256, original_max_position_embeddings=256, init_method_std=0.06)
    training = TrainingConfig(
        seq_length=256, micro_batch_size=2, global_batch_size=8, train_iters=400, lr=6e-3, min_lr=1e-4,
        lr_warmup_iters=30, lr_decay_style="linear", moe_router_bias_update_rate=5e-3, eval_interval=100,
        eval_iters=16)
    return _run("tiny", model, training)


def laptop() -> RunConfig:
    """88M parameters (and 8M of MTP): the size at which a laptop's experiments say something."""
    model = ModelConfig(
        num_layers=8, num_dense_layers=1, hidden_size=512, num_attention_heads=8, q_lora_rank=256, kv_lora_rank=128,
        qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64, ffn_hidden_size=1536, num_experts=16,
        moe_ffn_hidden_size=256, moe_router_topk=4, moe_router_num_groups=4, moe_router_group_topk=2,
        num_shared_experts=1, mtp_num_layers=1, vocab_size=32000, max_position_embeddings=512,
        original_max_position_embeddings=512, init_method_std=0.02)
    training = TrainingConfig(
        seq_length=512, micro_batch_size=4, global_batch_size=16, train_iters=2000, lr=1e-3, min_lr=1e-4,
        lr_warmup_iters=100)
    return _run("laptop", model, training)


def dsv3_16b() -> RunConfig:
    """A research model for one node of eight GPUs: 16B parameters.

    Widths and counts are DeepSeek-V2-Lite's (DeepSeek-V2 report, arXiv 2405.04434, appendix B: 27
    layers, hidden 2048, 16 heads, latent 512, 64 routed experts of width 1408 of which 6, 2 shared,
    dense FFN 10944); routing, MTP, vocabulary and initialisation are DeepSeek-V3's. The V3 report's FP8
    and balancing ablations used a model of this size. One group: a single node needs no node limit.
    Batch and learning rate are ours: V2-Lite's 4.2e-4 and 4608 sequences of 4K.
    """
    model = ModelConfig(
        num_layers=27, num_dense_layers=1, hidden_size=2048, num_attention_heads=16, q_lora_rank=None,
        kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, ffn_hidden_size=10944,
        num_experts=64, moe_ffn_hidden_size=1408, moe_router_topk=6, num_shared_experts=2, mtp_num_layers=1,
        vocab_size=129280, max_position_embeddings=4096, init_method_std=0.006)
    training = TrainingConfig(
        seq_length=4096, micro_batch_size=1, global_batch_size=4608, train_iters=100_000, lr=4.2e-4, min_lr=4.2e-5,
        lr_warmup_iters=2000, exp_avg_dtype="bf16", exp_avg_sq_dtype="bf16", ema_decay=0.999)
    return _run("dsv3-16b", model, training, ParallelConfig(expert_model_parallel_size=8))


def dsv3_671b() -> RunConfig:
    """DeepSeek-V3: architecture and recipe of sections 2 and 4 of its report, layout and precision of section 3.

    The layout is PP16 under DualPipe, EP64, ZeRO-1 data parallelism, no TP, on 2048 GPUs (sections 3.1 and 3.2), in FP8
    (3.3), with norms, up-projections of attention and SwiGLU computed again (3.2.3). Micro-batch 1 is from DeepEP's "V3
    pre-training setting". It is pre-training's, and 128 replicas cannot share the 480 sequences of the last phase: the
    run stops before the extension, and goes on with --stop-after-phase none. The report does not give the extension's
    layout; ours keeps PP16 and EP64, and 8 and 32 ranks share a sequence, so that each has 4K tokens as before. They
    exchange heads for tokens (a2a), under DualPipeV: DualPipe, and a ring, would need more memory or more time by the
    planner. Moments in BF16 and an average of the weights are the report's (sections 3.3.1 and
    3.2.3); the average's decay is ours. The modules are this library's: Transformer Engine's keep more than fits into
    80 GB.
    """
    model = ModelConfig(
        num_layers=61, num_dense_layers=3, hidden_size=7168, num_attention_heads=128, q_lora_rank=1536,
        kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, ffn_hidden_size=18432,
        num_experts=256, moe_ffn_hidden_size=2048, moe_router_topk=8, moe_router_num_groups=8,
        moe_router_group_topk=4, num_shared_experts=1, mtp_num_layers=1, vocab_size=129280,
        max_position_embeddings=4096, init_method_std=0.006)
    training = TrainingConfig(
        seq_length=4096, micro_batch_size=1, global_batch_size=3072, lr=2.2e-4, precision="bf16",
        mtp_loss_scaling_factor=0.3, moe_router_bias_update_rate=1e-3, phases=_under_our_layouts(deepseek_v3_phases()),
        stop_after_phase="lowest", exp_avg_dtype="bf16", exp_avg_sq_dtype="bf16", ema_decay=0.999,
        recompute_granularity="selective", transformer_impl="local")
    parallel = ParallelConfig(pipeline_model_parallel_size=16, expert_model_parallel_size=64,
                              pipeline_schedule="dualpipe")
    return _run("dsv3-671b", model, training, parallel, Fp8Config("blockwise"))


def moonlight_16b() -> RunConfig:
    """Moonlight-16B-A3B, which is DeepSeek-V3's architecture at V2-Lite's widths.

    Widths, counts and norms are those of the published `config.json` (moonshotai/Moonlight-16B-A3B): 27 layers,
    full-rank queries, one group, two shared experts, no MTP. Transformers and DeepSeek's code norm the latents with
    1e-6 whatever `rms_norm_eps` is. Batch, learning rate and AdamW are those of dsv3-16b; Moonlight was trained with
    Muon.
    """
    base = dsv3_16b()
    model = dataclasses.replace(
        base.model, ffn_hidden_size=11264, mtp_num_layers=0, vocab_size=163840, moe_router_topk_scaling_factor=2.446,
        max_position_embeddings=8192, original_max_position_embeddings=8192, rotary_base=50000.0,
        layernorm_epsilon=1e-5, latent_layernorm_epsilon=1e-6, init_method_std=0.02)
    training = dataclasses.replace(base.training, seq_length=8192, transformer_impl="local")
    return dataclasses.replace(base, preset="moonlight-16b", model=model, training=training)


def kimi_k2() -> RunConfig:
    """Kimi-K2: DeepSeek-V3 with 384 experts in one group, half the heads and one dense layer; 1.03T parameters.

    Widths and counts are those of the published `config.json` (moonshotai/Kimi-K2-Base), before its context is
    extended by YaRN. It has no MTP. The layout and FP8 are dsv3-671b's, with which it fits 2048 GPUs of 80 GB by the
    estimate; batch and learning rate are V3's at their full size. All of these are ours, and so is AdamW, for Kimi-K2
    was trained with Muon. Nothing of this size has been run here.
    """
    base = dsv3_671b()
    model = dataclasses.replace(
        base.model, num_dense_layers=1, num_attention_heads=64, num_experts=384, moe_router_num_groups=1,
        moe_router_group_topk=1, moe_router_topk_scaling_factor=2.827, mtp_num_layers=0, vocab_size=163840,
        rotary_base=50000.0, init_method_std=0.02)
    training = TrainingConfig(
        seq_length=4096, micro_batch_size=1, global_batch_size=15360, train_iters=250_000, lr=2.2e-4, min_lr=2.2e-5,
        lr_warmup_iters=2000, precision="bf16", exp_avg_dtype="bf16", exp_avg_sq_dtype="bf16", ema_decay=0.999,
        recompute_granularity="selective", transformer_impl="local")
    return _run("kimi-k2", model, training, base.parallel, base.fp8)


def _under_our_layouts(phases: tuple[Phase, ...]) -> tuple[Phase, ...]:
    """DeepSeek-V3's phases, those of long sequences with a layout."""
    ranks = {"extension-32k": 8, "extension-128k": 32}
    layout: dict[str, Any] = {
        "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 16, "pipeline_schedule": "dualpipev",
        "num_virtual_stages_per_pipeline_rank": 1, "expert_model_parallel_size": 64, "cp_comm_type": "a2a"}
    return tuple(dataclasses.replace(phase, **layout | {"context_parallel_size": ranks[phase.name]})
                 if phase.name in ranks else phase for phase in phases)


def deepseek_v3_phases() -> tuple[Phase, ...]:
    """DeepSeek-V3's 14.8T tokens at 4K and its extension to 128K, from 3072 sequences a step and an lr of 2.2e-4.

    Ours, where the report does not say: the batch grows by 1024 sequences at a time (`ramps.py` says why in a straight
    line; 1024 is the finest power of two that divides 3072, so that any power of two of replicas up to it can do every
    step); lambda and gamma stay through the extension what they were at the end of the 14.8T.

    Source: DeepSeek-V3 report, sections 4.2 (hyper-parameters) and 4.3 (long context).
    """
    billion, trillion = 10**9, 10**12
    return (
        Phase("ramp", train_tokens=469 * billion, lr_warmup_iters=2000, global_batch_size=15360,
              global_batch_size_increment=1024),
        Phase("constant", train_tokens=10 * trillion - 469 * billion),
        Phase("decay", train_tokens=4300 * billion, lr=2.2e-5, lr_decay_style="cosine", mtp_loss_scaling_factor=0.1),
        Phase("low", train_tokens=333 * billion, moe_router_bias_update_rate=0.0),
        Phase("lowest", train_tokens=167 * billion, lr=7.3e-6),
        Phase("extension-32k", train_iters=1000, seq_length=32 * 1024, global_batch_size=1920, rope_type="yarn",
              rotary_scaling_factor=40.0, original_max_position_embeddings=4096, beta_fast=32.0, beta_slow=1.0,
              mscale=1.0, mscale_all_dim=1.0),
        Phase("extension-128k", train_iters=1000, seq_length=128 * 1024, global_batch_size=480),
    )


PRESETS: dict[str, Callable[[], RunConfig]] = {
    "tiny": tiny,
    "laptop": laptop,
    "dsv3-16b": dsv3_16b,
    "dsv3-671b": dsv3_671b,
    "moonlight-16b": moonlight_16b,
    "kimi-k2": kimi_k2,
}


# The record of a run that began with a model's `config.json`, or a checkpoint's architecture, and no preset.
HUGGING_FACE = "hugging-face"


def run_of_model(model: ModelConfig) -> RunConfig:
    """A run of an architecture that no preset has, with every other setting as it is by default.

    Batch and length are small; learning rate, loss weights and sequence length are DeepSeek-V3's.
    """
    return _run(HUGGING_FACE, model, TrainingConfig())


def preset(name: str) -> RunConfig:
    """The run called `name`.

    Raises:
        ConfigError: no such preset; the message lists them.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise ConfigError(f"preset={name!r} is not known; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]()
