"""Megatron-LM's flags: each of its DeepSeek-V3 recipes' is taken, taken with a note, or refused with a way out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_megatron.commands import train
from dsv3_megatron.config import megatron_docs
from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.load import parse_command
from dsv3_megatron.config.megatron_flags import (
    ALWAYS,
    BRIDGE,
    BY_NAME,
    FLAGS,
    NO_EFFECT,
    REFUSED,
    SAME_NAME,
    TRANSLATED,
    MegatronFlag,
)
from dsv3_megatron.config.megatron_values import _TRANSLATIONS
from dsv3_megatron.config.presets import preset
from dsv3_megatron.data.indexed_writer import DatasetWriter

# Every flag of the scripts and configurations that megatron_flags.py names as its sources.
PUBLISHED = """
--adam-beta1 --adam-beta2 --attention-backend --attention-dropout --attention-softmax-in-fp32 --auto-detect-ckpt-format
--bf16 --calculate-per-token-loss --ckpt-format --clip-grad --context-parallel-size --cross-entropy-fusion-impl
--cross-entropy-loss-fusion --cuda-graph-impl --cuda-graph-scope --cuda-graph-warmup-steps --data-cache-path --data-path
--data-parallel-sharding-strategy --decoder-first-pipeline-num-layers --decoder-last-pipeline-num-layers
--delay-wgrad-compute --deterministic-mode --disable-bias-linear --dist-ckpt-strictness --distributed-timeout-minutes
--enable-experimental --eval-interval --eval-iters --exit-duration-in-mins --exit-interval --exp-avg-dtype
--exp-avg-sq-dtype --expert-model-parallel-size --expert-tensor-parallel-size --ffn-hidden-size --finetune --fp8-format
--fp8-param-gather --fp8-recipe --fsdp-double-buffer --global-batch-size --hidden-dropout --hidden-size
--init-method-std --init-model-with-meta-device --kv-channels --kv-lora-rank --load --log-interval
--log-memory-to-tensorboard --log-num-zeros-in-grad --log-params-norm --log-throughput --log-timers-to-tensorboard
--log-validation-ppl-to-tensorboard --logging-level --lr --lr-decay-samples --lr-decay-style --lr-warmup-fraction
--lr-warmup-init --lr-warmup-samples --main-grads-dtype --main-params-dtype --make-vocab-size-divisible-by --manual-gc
--manual-gc-interval --max-position-embeddings --megatron-fsdp-grad-comm-dtype --megatron-fsdp-main-grads-dtype
--megatron-fsdp-main-params-dtype --merge-file --micro-batch-size --min-lr --moe-aux-loss-coeff --moe-deepep-num-sms
--moe-enable-deepep --moe-ffn-hidden-size --moe-flex-dispatcher-backend --moe-grouped-gemm --moe-hybridep-num-sms
--moe-layer-freq --moe-layer-recompute --moe-permute-fusion --moe-router-bias-update-rate --moe-router-dtype
--moe-router-enable-expert-bias --moe-router-force-load-balancing --moe-router-fusion --moe-router-group-topk
--moe-router-load-balancing-type --moe-router-num-groups --moe-router-padding-for-fp8
--moe-router-padding-for-quantization --moe-router-pre-softmax --moe-router-score-function --moe-router-topk
--moe-router-topk-scaling-factor --moe-shared-expert-intermediate-size --moe-shared-expert-overlap
--moe-token-dispatcher-type --moe-token-drop-policy --mscale --mscale-all-dim --mtp-loss-scaling-factor --mtp-num-layers
--multi-latent-attention --no-bias-swiglu-fusion --no-check-for-nan-in-loss-and-grad
--no-create-attention-mask-in-dataloader --no-gradient-accumulation-fusion --no-load-optim --no-load-rng
--no-masked-softmax-fusion --no-mmap-bin-files --no-rope-fusion --no-save-optim --norm-epsilon --normalization
--num-attention-heads --num-distributed-optimizer-instances --num-experts --num-layers
--num-layers-per-virtual-pipeline-stage --num-virtual-stages-per-pipeline-rank --num-workers --offload-optimizer-states
--optimizer-cpu-offload --outer-dp-sharding-strategy --overlap-cpu-optimizer-d2h-h2d --overlap-grad-reduce
--overlap-moe-expert-parallel-comm --overlap-param-gather --pipeline-model-parallel-layout
--pipeline-model-parallel-size --position-embedding-type --profile --profile-ranks --profile-step-end
--profile-step-start --q-lora-rank --qk-head-dim --qk-layernorm --qk-pos-emb-head-dim --recompute-activations
--recompute-granularity --recompute-method --recompute-modules --recompute-num-layers
--reuse-grad-buf-for-mxfp8-param-ag --rotary-base --rotary-percent --rotary-scaling-factor --save --save-interval
--save-retain-interval --seq-length --sequence-parallel --split --swiglu --te-rng-tracker --tensor-model-parallel-size
--tensorboard-dir --tokenizer-model --tokenizer-type --tp-comm-overlap --train-iters --train-samples --transformer-impl
--untie-embeddings-and-output-weights --use-distributed-optimizer --use-flash-attn --use-mcore-models
--use-megatron-fsdp --use-nccl-ub --use-precision-aware-optimizer --use-pytorch-profiler --v-head-dim --vocab-file
--wandb-entity --wandb-exp-name --wandb-project --wandb-save-dir --weight-decay
""".split()

# The flags of examples/megatron_fsdp/sbatch_mfsdp_deepseek_v3.sh without FSDP, profiler and wandb; {}: places.
SCRIPT = """
--distributed-timeout-minutes 60 --tensor-model-parallel-size 1 --expert-model-parallel-size 8
--expert-tensor-parallel-size 1 --context-parallel-size 1 --use-distributed-optimizer --overlap-grad-reduce
--overlap-param-gather --use-mcore-models --sequence-parallel --use-flash-attn --disable-bias-linear
--micro-batch-size 4 --global-batch-size 2048 --train-samples 585937500 --exit-duration-in-mins 220
--no-check-for-nan-in-loss-and-grad --manual-gc --manual-gc-interval 10 --recompute-granularity selective
--recompute-modules mlp moe mla_up_proj layernorm --transformer-impl transformer_engine --seq-length 4096
--tokenizer-type HuggingFaceTokenizer --data-path {data} --split 99,1,0 --no-mmap-bin-files
--no-create-attention-mask-in-dataloader --num-workers 6 --num-layers 61 --hidden-size 7168 --ffn-hidden-size 18432
--num-attention-heads 128 --kv-channels 128 --max-position-embeddings 4096 --position-embedding-type rope
--rotary-base 10000 --make-vocab-size-divisible-by 3232 --normalization RMSNorm --norm-epsilon 1e-6 --swiglu
--untie-embeddings-and-output-weights --multi-latent-attention --attention-dropout 0.0 --hidden-dropout 0.0
--clip-grad 1.0 --weight-decay 0.1 --qk-layernorm --lr-decay-samples 584765624 --lr-warmup-samples 1536000
--lr-warmup-init 3.9e-7 --lr 3.9e-6 --min-lr 3.9e-7 --lr-decay-style cosine --adam-beta1 0.9 --adam-beta2 0.95
--num-experts 256 --moe-layer-freq [0]*3+[1]*58 --moe-ffn-hidden-size 2048 --moe-shared-expert-intermediate-size 2048
--moe-router-load-balancing-type seq_aux_loss --moe-router-topk 8 --moe-token-dispatcher-type flex
--moe-flex-dispatcher-backend hybridep --moe-router-pre-softmax --moe-grouped-gemm --moe-aux-loss-coeff 1e-4
--moe-router-group-topk 4 --moe-router-num-groups 8 --moe-router-topk-scaling-factor 2.5
--moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-router-bias-update-rate 1e-3
--moe-router-dtype fp32 --moe-permute-fusion --moe-router-force-load-balancing --q-lora-rank 1536 --kv-lora-rank 512
--qk-head-dim 128 --qk-pos-emb-head-dim 64 --v-head-dim 128 --rotary-scaling-factor 40 --mscale 1.0
--mscale-all-dim 1.0 --mtp-num-layers 1 --mtp-loss-scaling-factor 0.1 --eval-iters 32 --eval-interval 100
--auto-detect-ckpt-format --load {save} --save {save} --save-interval 100 --dist-ckpt-strictness log_all
--init-method-std 0.02 --log-timers-to-tensorboard --log-memory-to-tensorboard --log-num-zeros-in-grad
--log-params-norm --log-validation-ppl-to-tensorboard --log-throughput --log-interval 1 --logging-level 40
--tensorboard-dir {logs} --bf16 --enable-experimental
"""
# What an error must say, in order, and the change that it asks for: words, and what stands in their place.
ASKED = [
    (["--distributed-timeout-minutes is not supported: use --hang-timeout-s, in seconds",
      "--exit-duration-in-mins is not supported: send SIGTERM", "--lr-warmup-init 3.9e-7 is not supported, only 0",
      "--moe-router-force-load-balancing is not supported", "--log-num-zeros-in-grad is not supported",
      "--log-params-norm is not supported"],
     [("--distributed-timeout-minutes 60", "--hang-timeout-s 3600"), ("--exit-duration-in-mins 220", ""),
      ("--lr-warmup-init 3.9e-7", ""), ("--moe-router-force-load-balancing", ""),
      ("--log-num-zeros-in-grad", ""), ("--log-params-norm", "")]),
    (["--make-vocab-size-divisible-by 3232 must divide vocab_size=2048", "give --vocab-size", "129280"],
     [("--num-layers 61", "--num-layers 61 --vocab-size 129280")]),
    (["rotary_scaling_factor=40.0 is of YaRN", "give --rope-type yarn"],
     [("--rotary-scaling-factor 40", "--rope-type yarn --rotary-scaling-factor 40")]),
    (["recompute_modules=mlp moe: the modules that can be recomputed are layernorm, mla_up_proj, moe_act"],
     [("mlp moe mla_up_proj layernorm", "mla_up_proj layernorm moe_act")]),
    (["needs the package deep_ep, which is not installed"],
     [("--moe-token-dispatcher-type flex", "--moe-token-dispatcher-type node"),
      ("--moe-flex-dispatcher-backend hybridep", "")]),
]


def test_a_published_script_starts_after_the_changes_that_are_asked_for(tmp_path: Path,
                                                                        capsys: pytest.CaptureFixture[str]) -> None:
    with DatasetWriter(tmp_path / "data", vocab_size=128815) as writer:
        writer.add_documents(np.arange(1_000_000) % 1000, np.full(100, 10_000))
    text = " ".join(SCRIPT.split()).format(data=tmp_path / "data", save=tmp_path / "save", logs=tmp_path / "logs")
    for signs, changes in ASKED:
        assert train.main([*text.split(), "--check-only", "--world-size", "512"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        for sign in signs:
            assert sign in error, error
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
    assert train.main([*text.split(), "--check-only", "--world-size", "512"]) == 0, capsys.readouterr().err
    captured = capsys.readouterr()
    assert "length: 286,102 steps" in captured.out  # 585,937,500 samples in whole steps of 2,048
    notes = captured.err.splitlines()
    assert all(note.startswith("note: ") for note in notes) and len(notes) == 10
    run = parse_command(text.split()).run
    published = preset("dsv3-671b").model
    # A group's score is of 2 experts, which is what 8 of 4 groups makes too.
    assert run.model == preset("dsv3-671b").override(
        moe_router_group_score_topk=2, rope_type="yarn", rotary_scaling_factor=40.0, init_method_std=0.02,
        original_max_position_embeddings=run.model.original_max_position_embeddings).model
    assert run.model.num_dense_layers == published.num_dense_layers == 3
    training = run.training
    assert (training.train_iters, training.lr_decay_iters, training.lr_warmup_iters) == (286102, 285530, 750)
    assert run.training.precision == "bf16"


def test_notes_are_not_said_again_by_a_run_that_the_launcher_has_checked(capsys: pytest.CaptureFixture[str],
                                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "_check_inputs", lambda command, world_size, rank: [])
    monkeypatch.setattr(train, "_train", lambda command, rank: 77)
    assert train.main(["--swiglu"]) == 77
    assert capsys.readouterr().err == "note: in every run here: --swiglu\n"
    monkeypatch.setenv(train.ALREADY_CHECKED, "1")
    assert train.main(["--swiglu"]) == 77
    assert capsys.readouterr().err == ""


# -- the table -----------------------------------------------------------------------------------------


def test_every_published_flag_is_known() -> None:
    known = megatron_docs.own_flags() | BY_NAME.keys()
    assert [flag for flag in PUBLISHED if flag not in known] == []


# Every setting that Megatron-Bridge's recipes of the model write, of recipes/ and perf_recipes/deepseek.
BRIDGE_SETTINGS = """
checkpoint.async_save checkpoint.load checkpoint.save checkpoint.save_interval comm_overlap.delay_wgrad_compute
comm_overlap.overlap_grad_reduce comm_overlap.overlap_moe_expert_parallel_comm
comm_overlap.overlap_param_gather_with_optimizer_step dataset.blend dataset.num_workers dataset.seq_length
ddp.average_in_collective ddp.check_for_nan_in_grad ddp.data_parallel_sharding_strategy ddp.grad_reduce_in_fp32
ddp.keep_fp8_transpose_cache ddp.overlap_grad_reduce ddp.overlap_param_gather ddp.reuse_grad_buf_for_mxfp8_param_ag
ddp.use_distributed_optimizer ddp.use_megatron_fsdp dist.enable_megatron_core_experimental mixed_precision.fp4_param
mixed_precision.fp4_param_gather mixed_precision.fp8 mixed_precision.fp8_dot_product_attention
mixed_precision.fp8_param mixed_precision.fp8_param_gather mixed_precision.fp8_recipe
mixed_precision.num_layers_at_end_in_bf16 mixed_precision.num_layers_at_start_in_bf16
mixed_precision.reuse_grad_buf_for_mxfp8_param_ag model.account_for_embedding_in_pipeline_split
model.account_for_loss_in_pipeline_split model.attention_backend model.context_parallel_size
model.cross_entropy_fusion_impl model.cross_entropy_loss_fusion model.cuda_graph_impl model.cuda_graph_scope
model.cuda_graph_warmup_steps model.expert_model_parallel_size model.expert_tensor_parallel_size
model.fine_grained_activation_offloading model.fp8_output_proj model.gradient_accumulation_fusion
model.high_priority_a2a_comm_stream model.init_method_std model.init_model_with_meta_device model.kv_channels
model.make_vocab_size_divisible_by model.moe_expert_rank_capacity_factor model.moe_flex_dispatcher_backend
model.moe_grouped_gemm model.moe_hybridep_num_sms model.moe_hybridep_num_sms_preprocessing
model.moe_mlp_glu_interleave_size model.moe_pad_experts_for_cuda_graph_inference model.moe_paged_stash
model.moe_paged_stash_buffer_size_factor_cpu model.moe_paged_stash_buffer_size_factor_cuda model.moe_permute_fusion
model.moe_router_force_load_balancing model.moe_router_fusion model.moe_router_padding_for_fp8
model.moe_router_padding_for_quantization model.moe_shared_expert_overlap model.moe_token_dispatcher_type
model.mtp_loss_scaling_factor model.mtp_num_layers model.num_layers_in_first_pipeline_stage
model.num_layers_in_last_pipeline_stage model.offload_modules model.pipeline_dtype
model.pipeline_model_parallel_layout model.pipeline_model_parallel_size model.recompute_granularity
model.recompute_method model.recompute_modules model.recompute_num_layers model.rotary_base
model.rotary_scaling_factor model.seq_length model.sequence_parallel model.tensor_model_parallel_size
model.transformer_impl model.use_te_rng_tracker model.use_transformer_engine_op_fuser
model.virtual_pipeline_model_parallel_size optimizer.exp_avg_dtype optimizer.exp_avg_sq_dtype
optimizer.main_grads_dtype optimizer.main_params_dtype optimizer.overlap_param_gather_with_optimizer_step
optimizer.use_precision_aware_optimizer rng.te_rng_tracker scheduler.lr_warmup_iters tokenizer.tokenizer_model
tokenizer.tokenizer_type tokenizer.vocab_size train.exit_duration_in_mins train.global_batch_size train.manual_gc
train.manual_gc_eval train.manual_gc_interval train.micro_batch_size train.train_iters validation.eval_interval
""".split()


def test_every_setting_of_bridges_recipes_is_known() -> None:
    known = megatron_docs.own_flags() | BY_NAME.keys()
    named = {name for names, _ in BRIDGE for name in names.split(", ")}
    flags = {name: "--" + name.partition(".")[2].replace("_", "-") for name in BRIDGE_SETTINGS}
    assert [name for name, flag in flags.items() if flag not in known and name not in named] == []
    assert not [name for name in named if flags.get(name, "") in known]


def test_the_table_has_each_flag_once_and_none_of_our_own() -> None:
    assert len(BY_NAME) == len(FLAGS) and not BY_NAME.keys() & megatron_docs.own_flags()
    assert {flag.name for flag in FLAGS if flag.fate == TRANSLATED} == _TRANSLATIONS.keys()
    assert {flag.fate for flag in FLAGS} == {TRANSLATED, ALWAYS, NO_EFFECT, REFUSED}


READ_PARSER = """
import argparse, json, warnings
warnings.simplefilter("ignore")
from megatron.training.arguments import add_megatron_arguments
parser = argparse.ArgumentParser(allow_abbrev=False)
add_megatron_arguments(parser)
print(json.dumps({name: "0" if action.nargs == 0 else "+" if action.nargs in ("*", "+", 3) else "1"
                  for action in parser._actions for name in action.option_strings}))
"""


def test_names_and_numbers_of_words_are_those_of_megatron_lms_own_parser() -> None:
    """The package that is installed has it; flags of its development branch alone are named here."""
    done = subprocess.run([sys.executable, "-c", READ_PARSER], capture_output=True, text=True, timeout=300, check=True)
    theirs: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    newer = {"--offload-optimizer-states"}
    assert [flag.name for flag in FLAGS if flag.name not in theirs | dict.fromkeys(newer)] == []
    assert {flag.name: (flag.nargs, theirs[flag.name]) for flag in FLAGS
            if flag.name in theirs and flag.nargs != theirs[flag.name]} == {}
    assert set(SAME_NAME) == megatron_docs.own_flags() & theirs.keys()


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: flag.name)
def test_each_flag_has_its_fate(flag: MegatronFlag) -> None:
    value = {"0": [], "1": [flag.values[0] if flag.values else "7"], "+": [flag.values[0] if flag.values else "7"]}
    words = [flag.name, *value[flag.nargs]]
    if flag.fate == REFUSED:
        with pytest.raises(ConfigError, match=f"^{flag.name} is not supported: "):
            parse_command(words)
    elif flag.fate != TRANSLATED:
        command = parse_command(words)
        assert command.run == preset("tiny")
        assert [" ".join(words) in note for note in command.notes] == [True]
        if flag.values:
            with pytest.raises(ConfigError, match=f"^{flag.name} other is not supported, only {flag.values[0]}"):
                parse_command([flag.name, "other"])


# -- what is translated --------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "field", "value"), [
    ("--qk-head-dim 64", "qk_nope_head_dim", 64), ("--qk-pos-emb-head-dim=32", "qk_rope_head_dim", 32),
    ("--moe-layer-freq ([0]*2+[1]*2)", "num_dense_layers", 2), ("--moe-layer-freq 1", "num_dense_layers", 0),
    ("--moe-layer-freq [0,1,1,1]", "num_dense_layers", 1), ("--moe-layer-freq [0]*4", "num_dense_layers", 4),
    ("--moe-shared-expert-intermediate-size 192", "num_shared_experts", 2), ("--bf16", "precision", "bf16"),
    ("--train-samples 8079", "train_iters", 1009), ("--lr-decay-samples 800", "lr_decay_iters", 100),
    ("--lr-warmup-samples 80", "lr_warmup_iters", 10), ("--lr-warmup-fraction 0.05", "lr_warmup_iters", 20),
    ("--train-data-path 0.5 a 0.5 b", "data_path", ["0.5", "a", "0.5", "b"]),
    ("--fp8-recipe blockwise --fp8-format e4m3", "fp8", "blockwise"),
    ("--train-samples 16e3 --global-batch-size 16", "train_iters", 1000),
])
def test_a_flag_under_another_name(words: str, field: str, value: Any) -> None:
    command = parse_command(words.split())
    batch = {"global_batch_size": 16} if "--global-batch-size" in words else {}
    assert command.run == preset("tiny").override(**batch, **{field: value})
    assert command.notes and all(field in note for note in command.notes)


def test_what_divides_the_vocabulary_changes_nothing() -> None:
    assert parse_command(["--make-vocab-size-divisible-by", "128"]).run == preset("tiny")


@pytest.mark.parametrize(("words", "message"), [
    ("--bf16 --precision fp32", "--bf16 means precision=bf16, and its own flag says precision=fp32; leave one out"),
    ("--train-iters 5 --train-samples 80", "--train-samples 80 means train_iters=10, and its own flag says "
     "train_iters=5; leave one out"),
    ("--lr-warmup-samples 80 --lr-warmup-fraction 0.5", "--lr-warmup-fraction 0.5 means lr_warmup_iters=200, and "
     "--lr-warmup-samples says lr_warmup_iters=10"),
    ("--swiglu --swiglu", "--swiglu is given twice: --swiglu and --swiglu; leave one out"),
    ("--qk-head-dim 3 --qk-head-dim 4", "--qk-head-dim is given twice: --qk-head-dim 3 and --qk-head-dim 4"),
    ("--swiglu=1", "argument --swiglu: takes no value; see --help"),
    ("--qk-head-dim", "argument --qk-head-dim: expected one argument; see --help"),
    ("--qk-head-dim wide", "argument --qk-head-dim: invalid int value: 'wide'; see --help"),
    ("--moe-layer-freq [0]*3+[1]*58", "--moe-layer-freq [0]*3+[1]*58 has 61 numbers for num_layers=4 layers; use"),
    ("--moe-layer-freq 2", "--moe-layer-freq 2: dense layers come before all MoE layers here; use --num-dense-layers"),
    ("--moe-layer-freq [1,0,1,1]", "--moe-layer-freq [1,0,1,1]: dense layers come before all MoE layers here"),
    ("--moe-layer-freq 0", "--moe-layer-freq 0 must be a whole number or a sum of lists"),
    ("--moe-layer-freq __import__('os').system('x')", "--moe-layer-freq __import__('os').system('x') must be a whole"),
    ("--moe-layer-freq [1]*9**9**9", "--moe-layer-freq [1]*9**9**9 must be a whole number or a sum of lists"),
    ("--moe-shared-expert-intermediate-size 100", "--moe-shared-expert-intermediate-size 100 must be a multiple of "
     "moe_ffn_hidden_size=96"),
    ("--train-samples 7", "--train-samples 7 is less than one step of global_batch_size=8"),
    ("--lr-warmup-fraction 2", "--lr-warmup-fraction 2 must be between 0 and 1"),
    ("--fp8-format e4m3", "--fp8-format e4m3: FP8 is --fp8-recipe blockwise with --fp8-format e4m3 here, both given, "
     "not delayed with e4m3; or use --fp8 blockwise"),
    ("--fp8-recipe mxfp8 --fp8-format e4m3", "--fp8-recipe mxfp8: FP8 is --fp8-recipe blockwise"),
    ("--attention-dropout 0.1", "--attention-dropout 0.1 is not supported, only 0: there is no dropout"),
    ("--moe-router-dtype fp64", "--moe-router-dtype fp64 is not supported, only fp32"),
    ("--fp16 --profile", "--fp16 is not supported: use --precision bf16 or fp32, or --fp8 blockwise; "
     "--profile is not supported: use --trace-schedule"),
    ("--moe-router-score-functio sigmoid", "--moe-router-score-functio is not a flag; did you mean --moe-router-"),
    ("--rotary-scaling-factor 40", "rotary_scaling_factor=40.0 is of YaRN, and the run has rope_type=rope"),
])
def test_what_is_refused_or_contradicts(words: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_command(words.split())
    assert str(error.value).startswith(message)


def test_an_equal_value_contradicts_nothing() -> None:
    run = parse_command(["--precision", "bf16", "--bf16", "--lr-warmup-samples", "80", "--lr-warmup-iters", "10"]).run
    assert run == preset("tiny").override(precision="bf16", lr_warmup_iters=10)


@given(st.lists(st.tuples(st.lists(st.sampled_from([0, 1]), min_size=1, max_size=3), st.integers(1, 4)), min_size=1,
                max_size=4))
def test_patterns_of_layers_are_what_python_makes_of_them(parts: list[tuple[list[int], int]]) -> None:
    text = "(" + "+".join(f"{part}*{times}".replace(" ", "") for part, times in parts) + ")"
    layers = eval(text)
    words = ["--num-layers", str(len(layers)), "--moe-layer-freq", text]
    if layers == sorted(layers):
        assert parse_command(words).run.model.num_dense_layers == layers.count(0)
    else:
        with pytest.raises(ConfigError, match="dense layers come before all MoE layers here"):
            parse_command(words)
