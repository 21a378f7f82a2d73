"""Flags of Megatron-LM that this library spells otherwise, has always on, has no use for, or refuses: one table.

Flags that both have, with one name and one meaning, are fields of a run and not in it. Read by the command line
(`load.py`) and by docs/megatron_lm_flags.md, which `python -m dsv3_megatron.config.megatron_docs` writes.

Sources: Megatron-LM's megatron/training/arguments.py, examples/megatron_fsdp/sbatch_mfsdp_deepseek_v3.sh,
examples/post_training/modelopt/conf/deepseek-ai and tests/functional_tests (deepseekv3_proxy, deepseek_proxy);
Megatron-Bridge's recipes/deepseek and perf_recipes/deepseek; Megatron-MoE-ModelZoo's DeepSeek-V3.yaml and
best_practice/deepseek-v3.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

TRANSLATED, ALWAYS, NO_EFFECT, REFUSED = "translated", "always on", "no effect", "refused"


@dataclass(frozen=True)
class MegatronFlag:
    """A flag of Megatron-LM, and what becomes of it here.

    Attributes:
        name: The flag as it is written, "--" included.
        fate: TRANSLATED into fields of a run; ALWAYS: what it asks for holds in every run; NO_EFFECT: it changes no
            result here; REFUSED.
        text: What is done instead, or why, or what to use instead.
        nargs: Words it takes: "0", "1" or "+".
        values: Values that are taken, if not all: one that means something else is refused. Numbers are compared as
            numbers.
    """

    name: str
    fate: str
    text: str
    nargs: str = "0"
    values: tuple[str, ...] = ()


def _each(fate: str, nargs: str, text: str, names: str) -> Iterable[MegatronFlag]:
    return (MegatronFlag(f"--{name}", fate, text, nargs) for name in names.split())


def _only(name: str, values: str, text: str, *, fate: str = ALWAYS, nargs: str = "1") -> MegatronFlag:
    return MegatronFlag(f"--{name}", fate, text, nargs, tuple(values.split()))


def _becomes(name: str, text: str, *, nargs: str = "1") -> MegatronFlag:
    return MegatronFlag(f"--{name}", TRANSLATED, text, nargs)


_LAYOUT = "say which stage has which layers with --pipeline-model-parallel-layout"
_FSDP = ("Megatron-FSDP is not supported: optimizer states are split over data-parallel ranks, weights and gradients "
         "over tensor, pipeline and expert ranks; leave it out")
_OFFLOAD = ("nothing of a step is kept in host memory but the weights' average; see --recompute-granularity and "
            "--exp-avg-dtype")
_PHASES = "give phases, which change batch and learning rate over the run (--phases FILE)"
_FLEX = "use --moe-token-dispatcher-type flex, whose library decides about its SMs; leave it out"
_PROFILE = "use --trace-schedule for what each rank does when, or tools/bench for operations"

FLAGS: tuple[MegatronFlag, ...] = (
    # -- the same thing under another name --
    _becomes("qk-head-dim", "--qk-nope-head-dim"),
    _becomes("qk-pos-emb-head-dim", "--qk-rope-head-dim"),
    _becomes("moe-layer-freq", "--num-dense-layers: zeros in front, then ones"),
    _becomes("moe-shared-expert-intermediate-size", "--num-shared-experts times --moe-ffn-hidden-size"),
    _becomes("bf16", "--precision bf16", nargs="0"),
    _becomes("train-samples", "--train-iters, in whole steps of --global-batch-size"),
    _becomes("lr-decay-samples", "--lr-decay-iters, in whole steps of --global-batch-size"),
    _becomes("lr-warmup-samples", "--lr-warmup-iters, in whole steps of --global-batch-size"),
    _becomes("lr-warmup-fraction", "--lr-warmup-iters, a share of --lr-decay-iters"),
    _becomes("train-data-path", "--data-path, with --valid-data-path", nargs="+"),
    _becomes("fp8-recipe", "--fp8 blockwise, for blockwise with --fp8-format e4m3"),
    _becomes("fp8-format", "--fp8 blockwise, for e4m3 with --fp8-recipe blockwise"),
    _becomes("make-vocab-size-divisible-by", "checked: it must divide --vocab-size, which counts padded rows"),
    # -- what every run has, or what only one value of means what is done here --
    *_each(ALWAYS, "0", "the model has it", "multi-latent-attention swiglu untie-embeddings-and-output-weights "
           "disable-bias-linear qk-layernorm moe-router-enable-expert-bias use-mcore-models"),
    *_each(ALWAYS, "0", "affinities are of all experts, before any are chosen", "moe-router-pre-softmax"),
    *_each(ALWAYS, "0", "ZeRO-1: optimizer states are split over data-parallel ranks", "use-distributed-optimizer"),
    *_each(ALWAYS, "0", "on exactly where --tensor-model-parallel-size is more than 1", "sequence-parallel"),
    *_each(ALWAYS, "0", "a step's loss is divided by its tokens", "calculate-per-token-loss"),
    *_each(ALWAYS, "0", "gradients are summed in fp32", "accumulate-allreduce-grads-in-fp32"),
    *_each(ALWAYS, "0", "moments have the dtypes of --exp-avg-dtype and --exp-avg-sq-dtype",
           "use-precision-aware-optimizer"),
    *_each(ALWAYS, "0", "in the log line and in TensorBoard", "log-throughput log-validation-ppl-to-tensorboard "
           "log-timers-to-tensorboard log-memory-to-tensorboard"),
    _only("position-embedding-type", "rope", "rotary embedding"),
    _only("rotary-percent", "1", "the whole rotary part is turned"),
    _only("normalization", "RMSNorm", "RMSNorm"),
    _only("attention-dropout", "0", "there is no dropout"),
    _only("hidden-dropout", "0", "there is no dropout"),
    _only("optimizer", "adam", "AdamW"),
    _only("moe-router-dtype", "fp32", "the router computes in fp32"),
    _only("main-grads-dtype", "fp32", "main gradients are fp32"),
    _only("main-params-dtype", "fp32", "master weights are fp32"),
    _only("lr-warmup-init", "0", "the warm-up begins at 0"),
    _only("tokenizer-type", "HuggingFaceTokenizer", "the folder or file of --tokenizer-model"),
    _only("ckpt-format", "torch_dist", "checkpoints are torch_dist"),
    _only("data-parallel-sharding-strategy", "no_shard optim", "optimizer states are split, weights are not"),
    _only("num-distributed-optimizer-instances", "1", "one split over all data-parallel ranks"),
    _only("recompute-num-layers", "1", "with --recompute-granularity full each layer is computed again by itself"),
    _only("recompute-method", "uniform", "with --recompute-granularity full each layer is computed again by itself"),
    # -- what changes no result here --
    *_each(NO_EFFECT, "1", "no part of latent attention has this width", "kv-channels"),
    *_each(NO_EFFECT, "1", "no token is dropped", "moe-token-drop-policy"),
    *_each(NO_EFFECT, "0", "which kernels compute is chosen by --transformer-impl and the device",
           "use-flash-attn moe-grouped-gemm moe-permute-fusion moe-router-fusion cross-entropy-loss-fusion "
           "no-rope-fusion no-bias-swiglu-fusion no-masked-softmax-fusion no-bias-dropout-fusion no-persist-layer-norm "
           "no-gradient-accumulation-fusion attention-softmax-in-fp32 moe-router-padding-for-fp8 "
           "moe-router-padding-for-quantization enable-experimental"),
    *_each(NO_EFFECT, "1", "which kernels compute is chosen by --transformer-impl and the device",
           "cross-entropy-fusion-impl"),
    *_each(NO_EFFECT, "0", "what overlaps with what follows from --pipeline-schedule and "
           "--overlap-moe-expert-parallel-comm",
           "overlap-param-gather-with-optimizer-step tp-comm-overlap delay-wgrad-compute moe-shared-expert-overlap "
           "no-overlap-p2p-communication"),
    *_each(NO_EFFECT, "0", "samples are mapped from the files and made when they are needed",
           "no-mmap-bin-files no-create-attention-mask-in-dataloader"),
    *_each(NO_EFFECT, "1", "samples are mapped from the files and made when they are needed", "num-workers"),
    *_each(NO_EFFECT, "0", "memory and random numbers of the run are as they are", "manual-gc te-rng-tracker "
           "use-cpu-initialization init-model-with-meta-device no-load-rng no-save-rng"),
    *_each(NO_EFFECT, "1", "memory and random numbers of the run are as they are", "manual-gc-interval"),
    *_each(NO_EFFECT, "0", "the format is known, and whatever differs is an error", "auto-detect-ckpt-format"),
    *_each(NO_EFFECT, "1", "the format is known, and whatever differs is an error", "dist-ckpt-strictness"),
    *_each(NO_EFFECT, "1", "the log has one level", "logging-level"),
    *_each(NO_EFFECT, "0", "every step is checked: one with NaN or Inf is never applied",
           "no-check-for-nan-in-loss-and-grad"),
    # -- refused --
    *_each(REFUSED, "0", "use --precision bf16 or fp32, or --fp8 blockwise", "fp16"),
    *_each(REFUSED, "0", "gradients are summed in fp32; leave it out", "grad-reduce-in-bf16"),
    *_each(REFUSED, "0", "weights are gathered in BF16 and quantized once a step; leave it out",
           "fp8-param-gather reuse-grad-buf-for-mxfp8-param-ag"),
    *_each(REFUSED, "1", _LAYOUT, "decoder-first-pipeline-num-layers decoder-last-pipeline-num-layers"),
    *_each(REFUSED, "0", _LAYOUT, "account-for-embedding-in-pipeline-split account-for-loss-in-pipeline-split"),
    *_each(REFUSED, "1", "use --num-virtual-stages-per-pipeline-rank", "num-layers-per-virtual-pipeline-stage"),
    *_each(REFUSED, "0", "use --recompute-granularity selective, with --recompute-modules layernorm, mla_up_proj or "
           "moe_act", "recompute-activations moe-layer-recompute"),
    *_each(REFUSED, "0", "use --moe-token-dispatcher-type flex with --moe-flex-dispatcher-backend deepep",
           "moe-enable-deepep"),
    *_each(REFUSED, "1", _FLEX, "moe-deepep-num-sms moe-hybridep-num-sms"),
    *_each(REFUSED, "0", "a benchmark's setting: the model would learn nothing of routing; leave it out",
           "moe-router-force-load-balancing"),
    *_each(REFUSED, "1", "no token is dropped, and there are no other router losses; leave it out",
           "moe-expert-capacity-factor moe-z-loss-coeff moe-input-jitter-eps"),
    *_each(REFUSED, "0", _FSDP, "use-megatron-fsdp fsdp-double-buffer use-nccl-ub use-torch-fsdp2"),
    *_each(REFUSED, "1", _FSDP, "megatron-fsdp-grad-comm-dtype megatron-fsdp-main-grads-dtype "
           "megatron-fsdp-main-params-dtype outer-dp-sharding-strategy"),
    *_each(REFUSED, "0", _OFFLOAD, "optimizer-cpu-offload offload-optimizer-states overlap-cpu-optimizer-d2h-h2d "
           "fine-grained-activation-offloading"),
    *_each(REFUSED, "+", _OFFLOAD, "offload-modules"),
    *_each(REFUSED, "1", "there are no CUDA graphs; leave it out", "cuda-graph-impl cuda-graph-warmup-steps"),
    *_each(REFUSED, "+", "there are no CUDA graphs; leave it out", "cuda-graph-scope"),
    *_each(REFUSED, "0", "sums on a GPU may differ in their last bits from run to run; leave it out",
           "deterministic-mode"),
    *_each(REFUSED, "+", _PHASES, "rampup-batch-size"),
    *_each(REFUSED, "1", _PHASES, "lr-wsd-decay-iters lr-wsd-decay-samples lr-wsd-decay-style"),
    *_each(REFUSED, "0", "use dsv3 preprocess to make data, of any text", "mock-data"),
    *_each(REFUSED, "+", "nothing is tested in a run; use dsv3 evaluate", "test-data-path"),
    *_each(REFUSED, "1", "use --data-path", "data-args-path per-split-data-args-path"),
    *_each(REFUSED, "1", "use --tokenizer-model, a folder with a tokenizer.json", "vocab-file merge-file"),
    *_each(REFUSED, "0", "a checkpoint is resumed whole; start from weights alone with "
           "--pretrained-checkpoint", "finetune no-load-optim"),
    *_each(REFUSED, "0", "checkpoints hold the whole state, and weights alone with --export-hf; leave it out",
           "no-save-optim"),
    *_each(REFUSED, "1", "use --keep-last, the number of newest checkpoints that are kept", "save-retain-interval"),
    *_each(REFUSED, "1", "send SIGTERM (Slurm: #SBATCH --signal), after which the run saves and ends; or lower "
           "--train-iters", "exit-duration-in-mins exit-interval"),
    *_each(REFUSED, "1", "use --hang-timeout-s, in seconds", "distributed-timeout-minutes"),
    *_each(REFUSED, "0", "what is logged is always the same; leave it out", "log-params-norm log-num-zeros-in-grad"),
    *_each(REFUSED, "0", _PROFILE, "profile use-pytorch-profiler"),
    *_each(REFUSED, "1", _PROFILE, "profile-step-start profile-step-end"),
    *_each(REFUSED, "+", _PROFILE, "profile-ranks"),
)
BY_NAME = {flag.name: flag for flag in FLAGS}

# Flags that both have, with one name and one meaning.
SAME_NAME: tuple[str, ...] = tuple((
    "--adam-beta1 --adam-beta2 --adam-eps --async-save --attention-backend --clip-grad --context-parallel-size "
    "--cp-comm-type --data-cache-path "
    "--data-path --eod-mask-loss --eval-interval --eval-iters --exit-on-missing-checkpoint --exp-avg-dtype "
    "--exp-avg-sq-dtype --expert-model-parallel-size --expert-tensor-parallel-size --ffn-hidden-size "
    "--global-batch-size --hidden-size --init-method-std --kv-lora-rank --load --log-interval --lr "
    "--lr-decay-iters --lr-decay-style --lr-warmup-iters --max-position-embeddings --micro-batch-size --min-lr "
    "--moe-aux-loss-coeff --moe-ffn-hidden-size --moe-flex-dispatcher-backend --moe-token-dispatcher-type "
    "--moe-router-bias-update-rate --moe-router-group-topk --moe-router-load-balancing-type "
    "--moe-router-num-groups --moe-router-score-function --moe-router-topk --moe-router-topk-scaling-factor --mscale "
    "--mscale-all-dim --mtp-loss-scaling-factor --mtp-num-layers --norm-epsilon --num-attention-heads --num-experts "
    "--num-layers --num-virtual-stages-per-pipeline-rank --overlap-grad-reduce "
    "--overlap-moe-expert-parallel-comm --overlap-param-gather --pretrained-checkpoint "
    "--override-opt-param-scheduler --pipeline-model-parallel-layout --pipeline-model-parallel-size --q-lora-rank "
    "--recompute-granularity --recompute-modules --reset-attention-mask --reset-position-ids --rope-type --rotary-base "
    "--rotary-scaling-factor --save --save-interval --seed --seq-length --sft --split --tensor-model-parallel-size "
    "--tensorboard-dir --tokenizer-model --train-iters --transformer-impl --use-checkpoint-opt-param-scheduler "
    "--v-head-dim --valid-data-path --vocab-size --wandb-entity --wandb-exp-name --wandb-project --wandb-save-dir "
    "--weight-decay"
).split())

# Of those, and their kin, where more than the name needs to be known.
DIFFERENCES: tuple[tuple[str, str], ...] = (
    ("--rope-type", "rope by default; Megatron-LM's is yarn for latent attention. So --rotary-scaling-factor, --mscale "
     "and --mscale-all-dim need --rope-type yarn here"),
    ("--vocab-size", "rows with padding, from the preset; Megatron-LM pads the tokenizer's"),
    ("--recompute-modules", "layernorm, mla_up_proj and moe_act; attention keeps no scores to compute again"),
    ("--num-virtual-stages-per-pipeline-rank", "given beside --pipeline-model-parallel-layout, not taken from it"),
    ("--split", "99,1,0 by default"),
    ("--sft", "reads what dsv3 preprocess --sft made, not a file of conversations; dsv3 sft gives it"),
    ("--exp-avg-dtype, --exp-avg-sq-dtype", "fp32 or bf16"),
    ("--wandb-exp-name, --wandb-save-dir", "may be left out: the run's identity is its name, and --tensorboard-dir the "
     "folder; the step is a metric, iteration"),
    ("--cp-comm-type", "p2p, all_gather or a2a, the same in all layers; p2p and all_gather pass latents, not keys and "
     "values"),
    ("--async-save", "on, unless --no-async-save is given; a process writes, from a copy of its own in host memory"),
    ("--overlap-grad-reduce, --overlap-param-gather", "on where there are GPUs, unless --no-overlap-grad-reduce or "
     "--no-overlap-param-gather is given, under every schedule; a bucket is a layer, there is no --ddp-bucket-size"),
)

# Settings of Megatron-Bridge's recipes that Megatron-LM has no flag of the same name for.
BRIDGE: tuple[tuple[str, str], ...] = (
    ("dataset.blend", "--data-path"),
    ("model.virtual_pipeline_model_parallel_size", "--num-virtual-stages-per-pipeline-rank"),
    ("model.num_layers_in_first_pipeline_stage, model.num_layers_in_last_pipeline_stage", _LAYOUT),
    ("model.pipeline_dtype", "stages exchange what they compute in: --precision"),
    ("mixed_precision.fp8_param, mixed_precision.fp4_param, mixed_precision.fp4_param_gather",
     "not supported: weights are gathered in BF16 and quantized once a step"),
    ("mixed_precision.num_layers_at_start_in_bf16, mixed_precision.num_layers_at_end_in_bf16",
     "--fp8-override 'decoder.layers.0.*=bf16'"),
    ("mixed_precision.fp8_dot_product_attention, model.fp8_output_proj", "never in FP8 (DeepSeek-V3, 3.3)"),
    ("ddp.grad_reduce_in_fp32", "always"),
    ("ddp.check_for_nan_in_grad", "always: a step with NaN or Inf is not applied"),
    ("ddp.average_in_collective", "never: gradients are summed, and divided by the tokens of the step"),
    ("ddp.keep_fp8_transpose_cache, model.gradient_accumulation_fusion, model.use_transformer_engine_op_fuser, "
     "model.use_te_rng_tracker, model.high_priority_a2a_comm_stream, model.moe_mlp_glu_interleave_size, "
     "dist.enable_megatron_core_experimental, train.manual_gc_eval", "no effect on results here"),
    ("model.moe_hybridep_num_sms_preprocessing", "not supported: " + _FLEX),
    ("model.moe_expert_rank_capacity_factor, model.moe_paged_stash, model.moe_paged_stash_buffer_size_factor_cpu, "
     "model.moe_paged_stash_buffer_size_factor_cuda, model.moe_pad_experts_for_cuda_graph_inference",
     "not supported: experts take as many tokens as come, without CUDA graphs"),
)
