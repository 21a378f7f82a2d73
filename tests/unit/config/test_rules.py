"""Every rule that a run must keep, and what is said when it does not: the rule, the values, the field, the way out."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import traceback
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_megatron.config import guards, model, parallel, run, training
from dsv3_megatron.config.fields import ConfigError, divisors
from dsv3_megatron.config.presets import PRESETS, preset
from dsv3_megatron.config.run import SECTIONS, RunConfig


# One line a rule: what is changed in a preset, the number of processes, and what must be said.
def base(name: str) -> RunConfig:
    """A preset; of `tiny` with the batch and schedule that the messages below speak of, however it is tuned."""
    run = preset(name)
    if name != "tiny":
        return run
    return run.override(micro_batch_size=4, global_batch_size=16, train_iters=300, lr=3e-3, lr_warmup_iters=20,
                        moe_router_group_score_topk=None)


BROKEN: list[tuple[str, dict[str, Any], int, str]] = [
    # -- conversations, and what a run begins with --
    ("tiny", {"sft": True, "reset_attention_mask": True}, 1, "reset_attention_mask=True cannot go with sft=True: "
     "conversations are kept apart in any case, and their masks say what counts; leave it out"),
    ("tiny", {"sft": True, "long_conversations": "keep"}, 1, "long_conversations='keep' must be one of refuse, cut, "
     "drop"),
    ("tiny", {"long_conversations": "cut"}, 1, "long_conversations=cut is about conversations; give sft too, or leave "
     "it out"),
    ("tiny", {"pretrained_checkpoint": "a", "save": "a"}, 1, "pretrained_checkpoint=a is what the run begins with, and "
     "save is where its own checkpoints go; give another folder for one of them"),
    # -- the architecture --
    ("tiny", {"num_layers": 0}, 1, "num_layers=0 must be at least 1"),
    ("tiny", {"hidden_size": -128}, 1, "hidden_size=-128 must be at least 1"),
    ("tiny", {"vocab_size": 0}, 1, "vocab_size=0 must be at least 1"),
    ("tiny", {"original_max_position_embeddings": 0}, 1, "original_max_position_embeddings=0 must be at least 1"),
    ("tiny", {"mtp_num_layers": -1}, 1, "mtp_num_layers=-1 must not be negative"),
    ("tiny", {"num_shared_experts": -1}, 1, "num_shared_experts=-1 must not be negative"),
    ("tiny", {"q_lora_rank": 0}, 1, "q_lora_rank=0 must be at least 1; leave it out for full-rank queries"),
    ("tiny", {"qk_rope_head_dim": 15}, 1, "qk_rope_head_dim=15 must be even: rotary embedding turns pairs"),
    ("tiny", {"num_dense_layers": 5}, 1, "num_dense_layers=5 must not exceed num_layers=4"),
    ("tiny", {"rope_type": "alibi"}, 1, "rope_type='alibi' must be one of rope, yarn"),
    ("tiny", {"rope_type": "yarn", "rotary_scaling_factor": 0.5}, 1,
     "rotary_scaling_factor=0.5 must be at least 1: YaRN extends the context by this factor"),
    ("tiny", {"rotary_base": 1.0}, 1, "rotary_base=1.0 must be greater than 1: the frequencies of the pairs are its "
     "negative powers"),
    ("tiny", {"rope_type": "yarn", "mscale": -0.1}, 1, "mscale=-0.1 must not be negative; 0 turns it off"),
    ("tiny", {"rope_type": "yarn", "beta_fast": 0.5}, 1, "beta_fast=0.5 must not be below beta_slow=1.0: frequencies "
     "above the one are kept, below the other interpolated"),
    ("tiny", {"mtp_num_layers": 3, "seq_length": 2}, 1, "mtp_num_layers=3 must be less than seq_length=2: the module "
     "of depth k predicts the token k positions beyond the next, and the last one would have none to predict"),
    ("tiny", {"moe_router_topk_scaling_factor": 0.0}, 1, "moe_router_topk_scaling_factor=0.0 must be greater than 0"),
    ("tiny", {"layernorm_epsilon": 0.0}, 1, "layernorm_epsilon=0.0 must be greater than 0"),
    ("tiny", {"latent_layernorm_epsilon": 0.0}, 1,
     "latent_layernorm_epsilon=0.0 must be greater than 0; leave it out for layernorm_epsilon"),
    ("tiny", {"latent_layernorm_epsilon": 1e-5, "transformer_impl": "transformer_engine"}, 1,
     "latent_layernorm_epsilon=1e-05 cannot differ from layernorm_epsilon=1e-06 with "
     "transformer_impl=transformer_engine; set transformer_impl=local"),
    ("tiny", {"rotary_base": float("inf")}, 1, "rotary_base=inf must be a finite number"),
    ("dsv3-671b", {"moe_router_num_groups": 6}, 1024,
     "moe_router_num_groups=6 must divide num_experts=256; try 4, 8 or 16"),
    ("tiny", {"moe_router_group_topk": 5}, 1, "moe_router_group_topk=5 must not exceed moe_router_num_groups=4"),
    ("tiny", {"moe_router_topk": 9}, 1, "moe_router_topk=9 must not exceed num_experts=8"),
    ("tiny", {"moe_router_topk": 6}, 1,
     "moe_router_topk=6 must not exceed the 4 experts in the moe_router_group_topk=2 groups a token may go to; "
     "keep more groups or choose fewer experts"),
    ("tiny", {"moe_router_topk": 3}, 1,
     "moe_router_group_topk=2 must divide moe_router_topk=3: a group's score is the sum of its topk/group_topk best "
     "experts; try 3, or set moe_router_group_score_topk"),
    ("tiny", {"moe_router_group_score_topk": 3}, 1,
     "moe_router_group_score_topk=3 must lie in 1..2, the experts of a group (num_experts=8 in "
     "moe_router_num_groups=4); leave it out for topk / group_topk"),
    ("tiny", {"moe_router_score_function": "tanh"}, 1,
     "moe_router_score_function='tanh' must be one of sigmoid, softmax"),
    ("tiny", {"moe_router_load_balancing_type": "aux_loss"}, 1,
     "moe_router_load_balancing_type='aux_loss' must be one of seq_aux_loss"),
    ("tiny", {"moe_router_group_mask": "inf"}, 1, "moe_router_group_mask='inf' must be one of exclude, zero"),
    # -- how it is split --
    ("tiny", {"tensor_model_parallel_size": 0}, 1, "tensor_model_parallel_size=0 must be at least 1"),
    ("tiny", {"num_communication_sms": 65}, 1,
     "num_communication_sms=65 must be 0 to 64, the most that NCCL uses; leave it out, or try 20"),
    ("tiny", {"context_parallel_size": 2, "seq_length": 250}, 2,
     "seq_length=250 must be a multiple of 4: context_parallel_size=2 cuts a sequence into 4 equal parts, two for each "
     "rank, and tensor_model_parallel_size=1 cuts those of a rank again; try seq_length=248 or 252"),
    ("tiny", {"context_parallel_size": 2, "tensor_model_parallel_size": 4, "seq_length": 132}, 8,
     "seq_length=132 must be a multiple of 8: context_parallel_size=2 cuts a sequence into 4 equal parts, two for each "
     "rank, and tensor_model_parallel_size=4 cuts those of a rank again; try seq_length=128 or 136"),
    ("tiny", {"context_parallel_size": 8, "cp_comm_type": "a2a"}, 8,
     "context_parallel_size=8 must divide num_attention_heads / tensor_model_parallel_size = 4 with cp_comm_type=a2a, "
     "which divides heads; try 1, 2 or 4, or cp_comm_type=p2p"),
    ("tiny", {"context_parallel_size": 2, "cp_comm_type": "a2a+p2p"}, 2,
     "cp_comm_type='a2a+p2p' must be one of p2p, all_gather, a2a"),
    ("tiny", {"context_parallel_size": 2, "cp_comm_type": "a2a", "cp_fp8_latents": True}, 2,
     "cp_fp8_latents narrows the latents that ranks pass, and cp_comm_type=a2a passes none; leave it out, or set "
     "cp_comm_type=p2p"),
    ("tiny", {"context_parallel_size": 2, "attention_backend": "fused"}, 2,
     "attention_backend=fused cannot attend to blocks of other ranks' tokens, which context_parallel_size=2 with "
     "cp_comm_type=p2p has; set attention_backend=auto, or cp_comm_type=a2a"),
    ("tiny", {"context_parallel_size": 2, "transformer_impl": "transformer_engine"}, 2,
     "context_parallel_size=2 cannot go with transformer_impl=transformer_engine, whose attention is not given "
     "latents; set transformer_impl=local"),
    ("tiny", {"tensor_model_parallel_size": 3}, 3,
     "tensor_model_parallel_size=3 must divide num_attention_heads=4; try 1, 2 or 4"),
    ("tiny", {"tensor_model_parallel_size": 4, "ffn_hidden_size": 386}, 4,
     "tensor_model_parallel_size=4 must divide ffn_hidden_size=386; try 1 or 2"),
    ("tiny", {"tensor_model_parallel_size": 4, "moe_ffn_hidden_size": 98}, 4,
     "tensor_model_parallel_size=4 must divide num_shared_experts * moe_ffn_hidden_size=98; try 1 or 2"),
    ("tiny", {"tensor_model_parallel_size": 4, "vocab_size": 4098}, 4,
     "tensor_model_parallel_size=4 must divide vocab_size=4098; try 1 or 2"),
    ("tiny", {"tensor_model_parallel_size": 4, "seq_length": 255}, 4,
     "tensor_model_parallel_size=4 must divide seq_length=255; try 1"),
    ("dsv3-671b", {"expert_model_parallel_size": 6}, 96,
     "expert_model_parallel_size=6 must divide num_experts=256; try 2, 4 or 8"),
    ("tiny", {"expert_tensor_parallel_size": 5}, 5,
     "expert_tensor_parallel_size=5 must divide moe_ffn_hidden_size=96; try 3, 4 or 6"),
    ("tiny", {"pipeline_model_parallel_size": 8}, 8,
     "pipeline_model_parallel_size=8 x num_virtual_stages_per_pipeline_rank=1 makes 8 stages, more than num_layers=4; "
     "use at most 4 stages"),
    ("tiny", {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 3}, 2,
     "pipeline_model_parallel_size=2 x num_virtual_stages_per_pipeline_rank=3 makes 6 stages, more than num_layers=4; "
     "use at most 4 stages"),
    ("tiny", {"num_virtual_stages_per_pipeline_rank": 2}, 1,
     "num_virtual_stages_per_pipeline_rank=2 needs pipeline_model_parallel_size of at least 2: the interleaved "
     "schedule is a pipeline schedule"),
    ("tiny", {"pipeline_schedule": "dualpip", "pipeline_model_parallel_size": 2}, 2,
     "pipeline_schedule='dualpip' must be one of auto, 1f1b, interleaved, zb1p, zbv, dualpipe, dualpipev; did you mean "
     "dualpipe?"),
    ("tiny", {"pipeline_schedule": "zbv", "pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2},
     2, "num_virtual_stages_per_pipeline_rank=2 must be 1 under pipeline_schedule=zbv, whose ranks hold 2 stages each; "
     "leave it at 1, or set pipeline_schedule=interleaved"),
    ("tiny", {"pipeline_schedule": "zb1p"}, 1,
     "pipeline_schedule=zb1p needs pipeline_model_parallel_size of at least 2; without a pipeline leave it at auto"),
    ("tiny", {"overlap_moe_expert_parallel_comm": True, "pipeline_model_parallel_size": 2}, 2,
     "overlap_moe_expert_parallel_comm=true needs a schedule that can run a forward and a backward pass as a pair: "
     "interleaved, dualpipe or dualpipev; this run's is 1f1b; try num_virtual_stages_per_pipeline_rank=2"),
    ("tiny", {"overlap_moe_expert_parallel_comm": True}, 1,
     "overlap_moe_expert_parallel_comm=true needs a schedule that can run a forward and a backward pass as a pair: "
     "interleaved, dualpipe or dualpipev; this run's is 1f1b, without a pipeline; leave it off"),
    ("tiny", {"pipeline_schedule": "interleaved", "pipeline_model_parallel_size": 2}, 2,
     "num_virtual_stages_per_pipeline_rank=1 must be at least 2 under pipeline_schedule=interleaved, which is 1f1b "
     "with one; try 2, or pipeline_schedule=1f1b"),
    ("tiny", {"pipeline_schedule": "dualpipe", "pipeline_model_parallel_size": 3}, 3,
     "pipeline_model_parallel_size=3 must be even under pipeline_schedule=dualpipe, whose ranks hold a stage before "
     "the middle of the model and one behind it; try 2 or 4"),
    ("tiny", {"pipeline_schedule": "dualpipev", "pipeline_model_parallel_size": 4}, 4,
     "pipeline_model_parallel_size=4 x 2 (pipeline_schedule=dualpipev) makes 8 stages, more than num_layers=4; use at "
     "most 4 stages"),
    ("tiny", {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, 6,
     "tensor_model_parallel_size x pipeline_model_parallel_size x context_parallel_size = 2 x 2 x 1 = 4 must divide "
     "world_size=6; start a multiple of 4 processes or lower a degree"),
    ("tiny", {"expert_model_parallel_size": 4, "ranks_per_node": 3}, 4,
     "expert_model_parallel_size=4 = 4 ranks do not lie evenly on nodes of ranks_per_node=3: one number must divide "
     "the other; try ranks_per_node=1, 2 or 4, or moe_token_dispatcher_type=alltoall, which asks for no nodes"),
    ("tiny", {"ranks_per_node": 0}, 1, "ranks_per_node=0 must be at least 1"),
    ("tiny", {"moe_token_dispatcher_type": "allgather"}, 1,
     "moe_token_dispatcher_type='allgather' must be one of auto, node, alltoall, flex"),
    ("tiny", {"moe_flex_dispatcher_backend": "nccl"}, 1,
     "moe_flex_dispatcher_backend='nccl' must be one of deepep, hybridep"),
    ("tiny", {"moe_token_dispatcher_type": "flex", "pipeline_model_parallel_size": 2, "pipeline_schedule": "dualpipe"},
     2, "moe_token_dispatcher_type=flex cannot be hidden by a pair of passes, and this run's schedule, dualpipe, has "
     "pairs; set moe_token_dispatcher_type=node, or a schedule without pairs"),
    ("tiny", {"moe_token_dispatcher_type": "flex", "fp8": "blockwise"}, 1,
     "fp8_dispatch=fp8 sends this library's own records, and moe_token_dispatcher_type=flex sends none; set "
     "fp8_dispatch=bf16, or moe_token_dispatcher_type=node"),
    ("tiny", {"expert_model_parallel_size": 4, "pipeline_model_parallel_size": 2}, 4,
     "expert_tensor_parallel_size x expert_model_parallel_size x pipeline_model_parallel_size = 1 x 4 x 2 = 8 must "
     "divide world_size=4; start a multiple of 8 processes or lower a degree"),
    # -- the batch, the schedule, the optimizer --
    ("tiny", {"micro_batch_size": 0}, 1, "micro_batch_size=0 must be at least 1"),
    ("tiny", {"train_iters": 0}, 1, "train_iters=0 must be at least 1"),
    ("tiny", {"micro_batch_size": 3}, 2,
     "micro_batch_size=3 x data_parallel_size=2 (world_size=2 over 1 model-parallel ranks) must divide "
     "global_batch_size=16; try a global_batch_size that is a multiple of 6, or a micro_batch_size of 1, 2 or 4"),
    ("tiny", {}, 3,
     "micro_batch_size=4 x data_parallel_size=3 (world_size=3 over 1 model-parallel ranks) must divide "
     "global_batch_size=16; try a global_batch_size that is a multiple of 12"),
    ("tiny", {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2, "global_batch_size": 12}, 2,
     "global_batch_size=12 over micro_batch_size=4 x data_parallel_size=1 does not fit the schedule: "
     "num_microbatches=3 must be a multiple of pipeline_model_parallel_size=2 under pipeline_schedule=interleaved, as "
     "Megatron-Core requires; try global_batch_size=8 or 16, or num_virtual_stages_per_pipeline_rank=1"),
    ("tiny", {"pipeline_model_parallel_size": 2, "pipeline_schedule": "dualpipe", "global_batch_size": 20}, 2,
     "global_batch_size=20 over micro_batch_size=4 x data_parallel_size=1 does not fit the schedule: "
     "num_microbatches=5 must be even under pipeline_schedule=dualpipe, where half of them enter at each end; try "
     "global_batch_size=16 or 24"),
    ("tiny", {"pipeline_model_parallel_size": 2, "pipeline_schedule": "dualpipe", "global_batch_size": 8}, 4,
     "global_batch_size=8 over micro_batch_size=4 x data_parallel_size=2 does not fit the schedule: num_microbatches=1 "
     "must be even under pipeline_schedule=dualpipe, where half of them enter at each end; try global_batch_size=16"),
    ("tiny", {"pipeline_model_parallel_size": 2, "pipeline_schedule": "interleaved", "global_batch_size": 12,
              "num_virtual_stages_per_pipeline_rank": 2}, 2,
     "global_batch_size=12 over micro_batch_size=4 x data_parallel_size=1 does not fit the schedule: "
     "num_microbatches=3 must be a multiple of pipeline_model_parallel_size=2 under pipeline_schedule=interleaved, as "
     "Megatron-Core requires; try global_batch_size=8 or 16"),
    ("tiny", {"seq_length": 512}, 1, "seq_length=512 must not exceed max_position_embeddings=256"),
    ("tiny", {"lr": -1e-3}, 1, "lr=-0.001 must not be negative"),
    ("tiny", {"lr": float("nan")}, 1, "lr=nan must be a finite number"),
    ("tiny", {"min_lr": 1.0}, 1, "min_lr=1.0 must not exceed lr=0.003"),
    ("tiny", {"seed": -1}, 1, "seed=-1 must not be negative"),
    ("tiny", {"seed": 2**32}, 1, "seed=4294967296 must not exceed 4294967295"),
    ("tiny", {"seed": 2**32 - 1, "phases": [{"name": "a", "train_iters": 1}, {"name": "b", "train_iters": 1,
                                                                             "seq_length": 128}]}, 1,
     "seed=4294967295 must not exceed 4294967294: each of the run's 2 datasets is shuffled by the seed before plus 1, "
     "all below 2^32"),
    ("tiny", {"train_iters": 2**31}, 1, "train_iters=2147483648 must not exceed 2147483647"),
    ("tiny", {"num_layers": 10**6}, 1, "num_layers=1000000 must not exceed 2000"),
    ("tiny", {"lr": 1e300}, 1, "lr=1e+300 must not exceed 1000000000000.0"),
    ("tiny", {"train_iters": "many"}, 1, "train_iters='many' must be a whole number"),
    ("tiny", {"save": ""}, 1, "save is an empty text; leave it out, or give it a value (in a shell: is the variable "
     "that it comes from set?)"),
    ("tiny", {"data_path": ["a", ""]}, 1, "data_path is an empty text; leave it out, or give it a value (in a shell: "
     "is the variable that it comes from set?)"),
    ("tiny", {"save": "a\0b"}, 1, "save='a\\x00b' has a zero byte in it, which no path and no name can have"),
    ("tiny", {"lr_decay_iters": 0, "lr_warmup_iters": 0}, 1,
     "lr_decay_iters=0 must be at least 1; leave it out for train_iters"),
    ("tiny", {"adam_beta2": 1.0}, 1, "adam_beta2=1.0 must be at least 0 and less than 1"),
    ("tiny", {"adam_eps": 0.0}, 1, "adam_eps=0.0 must be greater than 0"),
    ("tiny", {"eval_iters": 0}, 1, "eval_iters=0 must be at least 1; eval_interval=0 turns validation off"),
    ("tiny", {"lr_warmup_iters": 301}, 1,
     "lr_warmup_iters=301 must not exceed the 300 steps of lr_decay_iters (train_iters by default); make the warm-up "
     "shorter (--lr-warmup-iters 30) or the run longer"),
    ("tiny", {"lr_decay_iters": 19}, 1,
     "lr_warmup_iters=20 must not exceed the 19 steps of lr_decay_iters (train_iters by default); make the warm-up "
     "shorter (--lr-warmup-iters 1) or the run longer"),
    ("tiny", {"precision": "fp16"}, 1, "precision='fp16' must be one of auto, bf16, fp32"),
    ("tiny", {"transformer_impl": "te"}, 1, "transformer_impl='te' must be one of auto, local, transformer_engine"),
    ("tiny", {"attention_backend": "eager"}, 1,
     "attention_backend='eager' must be one of auto, flash, fused, unfused, local"),
    ("tiny", {"attention_backend": "local", "transformer_impl": "transformer_engine"}, 1,
     "attention_backend=local is this library's own attention, in local modules, not "
     "transformer_impl=transformer_engine; set transformer_impl=local, or another backend"),
    ("tiny", {"lr_decay_style": "wsd"}, 1, "lr_decay_style='wsd' must be one of constant, cosine, linear"),
    ("tiny", {"transformer_impl": "transformer_engine", "reset_attention_mask": True, "reset_position_ids": True,
              "eod_mask_loss": True}, 1,
     "reset_attention_mask=True and reset_position_ids=True cannot go with transformer_impl=transformer_engine, whose "
     "attention knows one document a sequence; set transformer_impl=local"),
    # -- phases in their run (test_phases.py has the rest) --
    ("tiny", {"phases": [{"name": "grow", "train_tokens": 10**6, "global_batch_size": 64,
                          "global_batch_size_increment": 6}]}, 2,
     "phase 'grow': the batch goes from 16 to global_batch_size=64 in steps of global_batch_size_increment=6, and on "
     "the way micro_batch_size=4 x data_parallel_size=2 (world_size=2 over 1 model-parallel ranks) must divide "
     "global_batch_size=22; try a global_batch_size that is a multiple of 8, or a micro_batch_size of 1 or 11"),
    ("tiny", {"phases": [{"name": "long", "train_iters": 5}, {"name": "longer", "train_iters": 5, "seq_length": 512}]},
     1, "phase 'longer': seq_length=512 must not exceed max_position_embeddings=256"),
    ("tiny", {"phases": [{"name": "short", "train_iters": 5}, {"name": "split", "train_iters": 5,
                                                               "context_parallel_size": 2}]}, 2,
     "phase 'split': the phase has another layout than the run begins with, and goes on from a checkpoint under it: "
     "give save, a folder, or --stop-after-phase a phase before it"),
    # -- what is written --
    ("tiny", {"max_failed_saves": -1}, 1, "max_failed_saves=-1 must not be negative; 0 never ends a run for "
     "checkpoints that cannot be written"),
    ("tiny", {"save": "checkpoints", "save_interval": 0}, 1, "save_interval=0 must be at least 1"),
    ("tiny", {"resume": "auto", "overwrite_run": True}, 1,
     "overwrite_run removes what resume=auto would go on from, at every start of the run; leave out --resume auto to "
     "begin anew, or --overwrite-run to go on"),
    ("tiny", {"export_hf": "exported"}, 1,
     "export_hf=exported needs save: the run's last checkpoint is what is exported"),
    ("tiny", {"keep_last": -1}, 1, "keep_last=-1 must not be negative; 0 keeps all checkpoints"),
    ("tiny", {"export_license": "Apache 2.0\ntags: [x]"}, 1, "export_license='Apache 2.0\\ntags: [x]' must be the "
     "hub's name of a licence, in lower case: apache-2.0, mit, cc-by-4.0, other, unknown"),
    ("tiny", {"trace_schedule": "trace.json"}, 1, "trace_schedule=trace.json records what pipeline ranks do and needs "
     "pipeline_model_parallel_size of at least 2; leave it out"),
    ("tiny", {"log_interval": 0}, 1, "log_interval=0 must be at least 1"),
    ("tiny", {"mlflow_experiment": "mine"}, 1, "mlflow_experiment=mine needs tensorboard_dir: a tracker gets what goes "
     "to that folder, which keeps what the tracker may miss; give --tensorboard-dir DIR"),
    ("tiny", {"tensorboard_dir": "logs", "wandb_entity": "us"}, 1,
     "wandb_entity=us is about Weights & Biases; give wandb_project too, or leave it out"),
    ("tiny", {"tensorboard_dir": "logs", "prometheus_file": "run.txt"}, 1, "prometheus_file=run.txt must end in .prom: "
     "node exporter's textfile collector reads no other file"),
    # -- guards --
    ("tiny", {"on_spike": "rollback"}, 1, "on_spike=rollback needs save: a folder of checkpoints to go back to; or "
     "choose on_spike=skip"),
    ("tiny", {"on_spike": "panic"}, 1, "on_spike='panic' must be one of log, skip, rollback"),
    ("tiny", {"spike_min_steps": 1}, 1, "spike_min_steps=1 must be at least 2: one step has no spread"),
    ("tiny", {"spike_window": 16}, 1,
     "spike_window=16 must be at least spike_min_steps=32, or no step would ever be judged"),
    ("tiny", {"spike_loss_threshold": -1.0}, 1, "spike_loss_threshold=-1.0 must not be negative; 0 turns it off"),
    ("tiny", {"spike_grad_norm_threshold": -0.5}, 1,
     "spike_grad_norm_threshold=-0.5 must not be negative; 0 turns it off"),
    ("tiny", {"spike_loss_floor": -0.1}, 1, "spike_loss_floor=-0.1 must not be negative"),
    ("tiny", {"spike_loss_floor": float("nan")}, 1, "spike_loss_floor=nan must be a finite number"),
    ("tiny", {"spike_grad_norm_floor": 0.5}, 1,
     "spike_grad_norm_floor=0.5 must be at least 1: it multiplies the median gradient norm"),
    ("tiny", {"max_consecutive_skips": -1}, 1, "max_consecutive_skips=-1 must not be negative"),
    ("tiny", {"max_rollbacks": -2}, 1, "max_rollbacks=-2 must not be negative"),
    ("tiny", {"hang_timeout_s": 0.5}, 1, "hang_timeout_s=0.5 must be at least 1 second; 0 turns it off"),
    ("tiny", {"hang_timeout_s": -3.0}, 1, "hang_timeout_s=-3.0 must be at least 1 second; 0 turns it off"),
]


@pytest.mark.parametrize(("name", "changes", "world_size", "message"), BROKEN, ids=[b[3][:48] for b in BROKEN])
def test_a_broken_rule_is_named_with_values_and_way_out(name: str, changes: dict[str, Any], world_size: int,
                                                        message: str) -> None:
    with pytest.raises(ConfigError) as error:
        base(name).override(**changes).validate(world_size)
    assert str(error.value) == message


def test_no_rule_goes_untested() -> None:
    """Every `raise ConfigError` of the rules' modules is reached by a line above."""
    reached = set()
    for name, changes, world_size, _message in BROKEN:
        with pytest.raises(ConfigError) as error:
            base(name).override(**changes).validate(world_size)
        cause: BaseException | None = error.value
        while cause is not None:  # a phase's error has that of the rule as its cause
            last = list(traceback.walk_tb(cause.__traceback__))[-1]
            reached.add((last[0].f_code.co_filename, last[1]))
            cause = cause.__cause__
    for module in (model, parallel, training, run, guards):
        for function in ast.walk(ast.parse(inspect.getsource(module))):
            # Tested in test_load.py, and where a plan or a rehearsal is asked for.
            if not isinstance(function, ast.FunctionDef) or function.name == "section_of":
                continue
            for node in ast.walk(function):
                if isinstance(node, ast.Raise):
                    lines = {(module.__file__, line) for line in range(node.lineno, (node.end_lineno or 0) + 1)}
                    assert lines & reached, f"no test reaches {module.__file__}:{node.lineno}"


@pytest.mark.parametrize(("name", "world_size"), [
    ("tiny", 1), ("tiny", 2), ("laptop", 1), ("dsv3-16b", 8), ("dsv3-671b", 1024), ("dsv3-671b", 2048)])
def test_presets_are_valid_where_they_are_meant_to_run(name: str, world_size: int) -> None:
    preset(name).validate(world_size)
    preset(name).validate()


@pytest.mark.parametrize(("changes", "world_size"), [
    ({"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}, 4),
    ({"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2}, 2),
    ({"tensor_model_parallel_size": 4, "expert_tensor_parallel_size": 2, "expert_model_parallel_size": 2}, 4),
    ({"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}, 2),
    *[({"pipeline_model_parallel_size": 2, "pipeline_schedule": name}, 2)
      for name in ("1f1b", "zb1p", "zbv", "dualpipe", "dualpipev")],
    ({"moe_router_num_groups": 1, "moe_router_group_topk": 1, "moe_router_topk": 5}, 1),
    ({"num_dense_layers": 4}, 1), ({"num_shared_experts": 0}, 1), ({"mtp_num_layers": 0}, 1),
    ({"q_lora_rank": None}, 1), ({"eval_interval": 0, "eval_iters": 0}, 1), ({"lr_warmup_iters": 300}, 1),
    ({"reset_attention_mask": True, "reset_position_ids": True, "eod_mask_loss": True}, 1),
    ({"transformer_impl": "transformer_engine", "eod_mask_loss": True}, 1),
    ({"lr": 0.0, "min_lr": 0.0}, 1), ({"save_interval": 0}, 1),
])
def test_what_is_possible_is_let_through(changes: dict[str, Any], world_size: int) -> None:
    base("tiny").override(**changes).validate(world_size)


def test_sizes_follow_from_degrees() -> None:
    split = preset("dsv3-671b").parallel
    assert (split.num_stages, split.model_parallel_size, split.minimum_world_size) == (16, 16, 1024)
    assert (split.data_parallel_size(2048), split.expert_data_parallel_size(2048)) == (128, 2)
    assert not split.sequence_parallel
    assert dataclasses.replace(split, tensor_model_parallel_size=2).sequence_parallel
    train = preset("dsv3-671b").recipe().phases[1].training
    assert train.num_microbatches(128) == 120
    assert train.tokens_per_step == 15360 * 4096


@given(tp=st.integers(1, 4), pp=st.integers(1, 4), ep=st.integers(1, 8), etp=st.integers(1, 4))
def test_the_minimum_world_size_is_the_smallest_that_fits(tp: int, pp: int, ep: int, etp: int) -> None:
    split = parallel.ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp,
                                    expert_model_parallel_size=ep, expert_tensor_parallel_size=etp)

    def fits(size: int) -> bool:
        try:
            split.validate_world_size(size)
        except ConfigError:
            return False
        return True

    assert next(size for size in range(1, 1000) if fits(size)) == split.minimum_world_size


@pytest.mark.parametrize(("number", "near", "words"), [
    (256, 6, "2, 4 or 8"), (1, 5, "1"), (6, 2, "1, 2 or 3"), (7, 3, "1 or 7"), (16, 100, "4, 8 or 16")])
def test_divisors_read_as_a_phrase(number: int, near: int, words: str) -> None:
    assert divisors(number, near=near) == words


def test_field_names_are_those_of_one_section_only() -> None:
    names = [field.name for cls in SECTIONS.values() for field in dataclasses.fields(cls)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_is_called_by_its_name_and_cannot_change(name: str) -> None:
    made = preset(name)
    assert made.preset == name and made == preset(name)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.model.num_layers = 1  # type: ignore[misc]


@pytest.mark.parametrize("name", ["tinny", 3, ["tiny"], None])
def test_an_unknown_preset_lists_those_there_are(name: Any) -> None:
    with pytest.raises(ConfigError, match="is not known; choose one of tiny, laptop, dsv3-16b, dsv3-671b"):
        preset(name)
