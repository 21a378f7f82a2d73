"""The small run that stands for a large one: narrow, shallow, on few processes, split in the same ways.

What decides which code runs is kept: the kinds of parallelism, the schedule, virtual stages, uneven stages, MTP
modules, recomputation, FP8, isolated documents, several micro-batches. What decides how much it computes is not:
widths, experts, layers, the sequence, replicas. What was taken away, and what is therefore not proved, is said.

Every width is another number, so that a mix-up of two of them cannot pass; with FP8 under tensor parallelism they are
multiples of a scale's block, so that no block is cut.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.guards import GuardConfig
from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.config.parallel import ParallelConfig
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.config.training import NO_LOGS, TrainingConfig
from dsv3_megatron.parallel.layout import StageLayout, layout_string, stage_layouts
from dsv3_megatron.planning.run_cost import main_phase, only_phase
from dsv3_megatron.rehearsal.rehearsed_run import fewest_microbatches

NUM_STEPS = 2
SEQ_LENGTH = 16
_FP8_BLOCK = 128
_HIDDEN, _FFN, _EXPERT_FFN, _VOCAB, _HEADS = 32, 40, 16, 48, 4
_MIN_EXPERTS = 12
# A pipeline of so many ranks has a first, a last and two middle ones.
_PIPELINE_OF_ALL_KINDS = 4
LEARNING_RATE, CLIP_GRAD = 0.05, 0.5
# AdamW's first update is g / (|g| + eps): with a small eps the sign of g, also of one that is rounding alone. This one
# is of the size of the clipped gradients, so that the update is smooth in them.
ADAM_EPS = 1e-3
# Large enough to be seen in the routers' gradients.
BALANCE_LOSS_ALPHA = 0.02
_BALANCE_LOSS = "seq_aux_loss"


@dataclass(frozen=True)
class ShrunkRun:
    """A run that this machine can do, which stands for another.

    Attributes:
        run: The small run.
        world_size: Processes of it.
        reductions: Ways in which it is less than the other, each with what is therefore not proved; not its widths.
    """

    run: RunConfig
    world_size: int
    reductions: tuple[str, ...]


def shrink(run: RunConfig, world_size: int, max_processes: int) -> ShrunkRun:
    """Make the small run that stands for a run on so many processes.

    Args:
        run: A run.
        world_size: Processes that it is for.
        max_processes: Processes that this machine can start for it.

    Raises:
        ConfigError: the run cannot be, or no layout of its kinds fits so few processes.
    """
    run.validate(world_size)
    _require_balance_loss(run.training)
    run = only_phase(run, main_phase(run))
    parallel, small_size, reductions = _fewer_ranks(run.parallel, world_size, max_processes)
    if parallel.cp_fp8_latents:
        parallel = dataclasses.replace(parallel, cp_fp8_latents=False)
        reductions.append("latents travel as they are: what FP8 makes of them is not proved")
    model, parallel, more = _smaller_model(run, parallel)
    replicas = parallel.data_parallel_size(small_size)
    micro_batch_size = min(run.training.micro_batch_size, 2)
    changes: dict[str, Any] = {
        "seq_length": _sequence_length(parallel), "micro_batch_size": micro_batch_size,
        "train_iters": NUM_STEPS, "lr": LEARNING_RATE, "min_lr": LEARNING_RATE, "lr_decay_iters": None,
        "clip_grad": CLIP_GRAD if run.training.clip_grad else 0.0, "adam_eps": ADAM_EPS, "ema_decay": 0.0,
        "eval_ema": False, "exp_avg_dtype": "fp32", "exp_avg_sq_dtype": "fp32", "moment_rounding": "stochastic",
        "moe_aux_loss_coeff": BALANCE_LOSS_ALPHA if run.training.moe_aux_loss_coeff else 0.0,
        "moe_router_bias_update_rate": 1e-3 if run.training.moe_router_bias_update_rate else 0.0,
        "precision": "fp32", "transformer_impl": "local", "eval_interval": 0,
        "load": None, "save": None, "export_hf": None, **NO_LOGS,
        "data_path": (), "valid_data_path": (), "tokenizer_model": None,
    }
    if run.fp8.is_enabled:
        changes |= {"fp8_backend": "reference", "fp8_accumulation": "fp32"}
    own = run.training.num_microbatches(run.parallel.data_parallel_size(world_size))
    small = dataclasses.replace(run, model=model, parallel=parallel, guards=GuardConfig()).override(
        **changes, global_batch_size=own * micro_batch_size * replicas)
    count = fewest_microbatches(small, small_size)
    small = small.override(global_batch_size=count * micro_batch_size * replicas)
    small.validate(small_size)
    if count < own:
        reductions.append(f"micro-batches of a step {own} -> {count}")
    if run.fp8.fp8_accumulation != small.fp8.fp8_accumulation:
        # It cuts off bits that a sum in another order has otherwise.
        more.append(f"accumulation {run.fp8.fp8_accumulation} -> fp32: the model of a tensor core's sums is not proved")
    return ShrunkRun(small, small_size, (*reductions, *more))


def _require_balance_loss(training: TrainingConfig) -> None:
    """Refuse what the reference, which is written from the papers alone, does not compute."""
    if training.moe_aux_loss_coeff and training.moe_router_load_balancing_type != _BALANCE_LOSS:
        raise ConfigError(f"moe_router_load_balancing_type={training.moe_router_load_balancing_type}: a layout is "
                          f"certified against a reference that has {_BALANCE_LOSS} alone; certify it with "
                          f"--moe-router-load-balancing-type {_BALANCE_LOSS}, or with --moe-aux-loss-coeff 0")


def _fewer_ranks(parallel: ParallelConfig, world_size: int, most: int) -> tuple[ParallelConfig, int, list[str]]:
    """The layout on as few ranks as need be: replicas are taken away first, then experts' and pipeline ranks."""
    has_replicas = parallel.data_parallel_size(world_size) > 1
    has_expert_replicas = parallel.expert_data_parallel_size(world_size) > 1
    if world_size <= most:
        return parallel, world_size, []
    smaller: list[tuple[dict[str, int], bool, bool]] = [({}, has_replicas, has_expert_replicas)]

    def then(name: str, largest: int) -> None:
        size = getattr(parallel, name)
        if size > largest:
            smaller.append(({**smaller[-1][0], name: largest}, *smaller[-1][1:]))

    then("expert_model_parallel_size", 2)
    then("pipeline_model_parallel_size", _PIPELINE_OF_ALL_KINDS)
    then("context_parallel_size", 2)
    then("tensor_model_parallel_size", 2)
    then("expert_tensor_parallel_size", 2)
    smaller.append((smaller[-1][0], has_replicas, False))
    then("pipeline_model_parallel_size", 2)
    smaller.append((smaller[-1][0], False, False))
    size = 0
    for changes, replicas, expert_replicas in smaller:
        sizes: dict[str, Any] = changes
        small = dataclasses.replace(parallel, **sizes)
        size = _fewest_ranks(small, replicas, expert_replicas)
        if size <= most:
            return small, size, _told(parallel, world_size, small, size)
    raise ConfigError(f"--processes={most} are too few: the smallest layout with the same kinds of parallelism has "
                      f"{size}; give --processes {size}, or a layout with fewer kinds")


def _fewest_ranks(parallel: ParallelConfig, has_replicas: bool, has_expert_replicas: bool) -> int:
    size = parallel.minimum_world_size
    while ((has_replicas and parallel.data_parallel_size(size) == 1)
           or (has_expert_replicas and parallel.expert_data_parallel_size(size) == 1)):
        size += parallel.minimum_world_size
    return size


def _told(parallel: ParallelConfig, world_size: int, small: ParallelConfig, size: int) -> list[str]:
    """The reductions in words."""
    told = [f"processes {world_size} -> {size}"]
    pairs = (
        ("data parallelism", parallel.data_parallel_size(world_size), small.data_parallel_size(size),
         "sums over more replicas are not proved", "sums of gradients and counts over replicas are not proved"),
        ("replicas of experts", parallel.expert_data_parallel_size(world_size), small.expert_data_parallel_size(size),
         "sums over more replicas are not proved", "sums of experts' gradients over replicas are not proved"),
        ("expert parallelism", parallel.expert_model_parallel_size, small.expert_model_parallel_size,
         "exchanges between more ranks are not proved", ""),
        ("pipeline ranks", parallel.pipeline_model_parallel_size, small.pipeline_model_parallel_size,
         "the order of a longer pipeline is not proved" if small.pipeline_model_parallel_size > 2
         else "middle ranks are not proved", ""),
        ("context parallelism", parallel.context_parallel_size, small.context_parallel_size,
         "blocks that are passed on more than once are not proved", ""),
        ("tensor parallelism", parallel.tensor_model_parallel_size, small.tensor_model_parallel_size,
         "finer cuts are not proved", ""),
        ("expert-tensor parallelism", parallel.expert_tensor_parallel_size, small.expert_tensor_parallel_size,
         "finer cuts are not proved", ""),
    )
    for name, before, after, lost, lost_at_one in pairs:
        if before != after:
            told.append(f"{name} {before} -> {after}: {lost_at_one if after == 1 and lost_at_one else lost}")
    return told


# ---- the model ----


def _multiple(wanted: int, of: int) -> int:
    """The smallest multiple of a number that is at least `wanted`."""
    return -(-wanted // of) * of


def _sequence_length(parallel: ParallelConfig) -> int:
    """A short sequence that the layout can split, into chunks of about a document's length."""
    return _multiple(max(SEQ_LENGTH, 8 * parallel.context_parallel_size), parallel.sequence_multiple)


def _smaller_model(run: RunConfig, parallel: ParallelConfig) -> tuple[ModelConfig, ParallelConfig, list[str]]:
    """A model with the same mechanisms for a layout that may have fewer ranks, and the layout of its stages."""
    model, told = run.model, []
    modules = min(model.mtp_num_layers, 2)
    if parallel.pipeline_model_parallel_layout is None:
        stages = parallel.num_stages
        layers = stages if stages > 4 else 2 * stages if stages > 1 else 4
        # An uneven split stays uneven.
        layers = max(stages, min(model.num_layers, layers + (stages > 1 and model.num_layers % stages > 0)))
    else:
        kept = _kept_stages(stage_layouts(model, run.parallel), parallel.num_stages, modules)
        parallel = dataclasses.replace(parallel, pipeline_model_parallel_layout=layout_string(kept))
        layers = sum(len(stage.layer_ids) for stage in kept)
    dense = layers if not model.num_moe_layers else min(model.num_dense_layers, 2, max(0, layers - 2))
    if dense == 0 < model.num_dense_layers and layers > 1:
        dense = 1
    for name, before, after in (("layers", model.num_layers, layers), ("MTP modules", model.mtp_num_layers, modules)):
        if before != after:
            told.append(f"{name} {before} -> {after}")
    small = dataclasses.replace(model, num_layers=layers, num_dense_layers=dense, mtp_num_layers=modules,
                                **_widths(run, parallel), **_routing(model, parallel), **_rotary(model))
    return small, parallel, told


def _kept_stages(stages: list[StageLayout], num_stages: int, num_modules: int) -> list[StageLayout]:
    """Some stages of a layout, the first and the last ones, with few layers each."""
    first = (num_stages + 1) // 2
    picked = stages[:first] + stages[len(stages) - (num_stages - first):]
    most = 3 if num_stages <= 4 else 2
    kept = [dataclasses.replace(stage, layer_ids=stage.layer_ids[:most],
                                mtp_layer_ids=tuple(range(num_modules)) if stage.mtp_layer_ids else ())
            for stage in picked]
    if num_modules and not any(stage.mtp_layer_ids for stage in kept):
        # Their stage is not among them: the one before the loss's takes them.
        kept[-2] = dataclasses.replace(kept[-2], mtp_layer_ids=tuple(range(num_modules)))
    return kept


def _widths(run: RunConfig, parallel: ParallelConfig) -> dict[str, Any]:
    tp, etp = parallel.tensor_model_parallel_size, parallel.expert_tensor_parallel_size
    cp = parallel.context_parallel_size
    widths: dict[str, Any] = {
        "hidden_size": _HIDDEN, "kv_lora_rank": 12, "q_lora_rank": None if run.model.q_lora_rank is None else 20,
        "vocab_size": _multiple(_VOCAB, tp), "num_shared_experts": min(run.model.num_shared_experts, 2),
        "init_method_std": 0.05}
    if run.fp8.is_enabled and max(tp, etp) > 1:
        return widths | {
            "num_attention_heads": 4 * tp * cp, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32,
            "ffn_hidden_size": _FP8_BLOCK * tp, "moe_ffn_hidden_size": _FP8_BLOCK * math.lcm(tp, etp)}
    return widths | {
        "num_attention_heads": _multiple(_HEADS, tp * cp), "qk_nope_head_dim": 10, "qk_rope_head_dim": 8,
        "v_head_dim": 6,
        "ffn_hidden_size": _multiple(_FFN, tp), "moe_ffn_hidden_size": _multiple(_EXPERT_FFN, math.lcm(tp, etp))}


def _routing(model: ModelConfig, parallel: ParallelConfig) -> dict[str, Any]:
    """Experts, groups and choices: a token always leaves out some experts that it could have gone to."""
    groups, kept = min(model.moe_router_num_groups, 4), model.moe_router_group_topk
    kept = min(kept, max(1, groups // 2)) if kept < model.moe_router_num_groups else groups
    top_k = min(model.moe_router_topk, 4)
    top_k = _multiple(top_k, kept)
    unit = math.lcm(groups, parallel.expert_model_parallel_size)
    if model.num_experts <= _MIN_EXPERTS and model.num_experts % unit == 0:
        experts = model.num_experts
    else:
        experts = _multiple(_MIN_EXPERTS, unit)
    if model.moe_router_topk < model.num_experts:
        while experts // groups * kept <= top_k:
            experts += unit
    else:
        experts = _multiple(top_k, unit)
        top_k = experts
    summed = model.moe_router_group_score_topk
    return {"num_experts": experts, "moe_router_topk": top_k, "moe_router_num_groups": groups,
            "moe_router_group_topk": kept,
            "moe_router_group_score_topk": None if summed is None else min(summed, experts // groups)}


def _rotary(model: ModelConfig) -> dict[str, Any]:
    values: dict[str, Any] = {"max_position_embeddings": 256}
    if model.rope_type == "yarn":
        # A short original context puts the ramp of the frequencies inside the few pairs that there are.
        values |= {"original_max_position_embeddings": 256, "rotary_base": 50.0}
    return values
