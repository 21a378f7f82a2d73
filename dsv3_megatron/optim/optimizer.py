"""AdamW with fp32 master weights and main gradients, its state sharded over the data-parallel ranks (ZeRO-1)."""

from __future__ import annotations

import logging
from typing import Any

import torch
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.process_groups_config import ProcessGroupCollection

from dsv3_megatron.config.training import TrainingConfig
from dsv3_megatron.model.stage.buckets import buckets_of
from dsv3_megatron.optim.adamw import NarrowMomentAdamW
from dsv3_megatron.optim.shards import ParameterShard, distributed_parts, master_shards, optimizer_chain

logger = logging.getLogger(__name__)

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_optimizer(
    training: TrainingConfig, chunks: list[torch.nn.Module], groups: ProcessGroupCollection, *, precision: str
) -> MegatronOptimizer:
    """Megatron-Core's distributed optimizer over this rank's wrapped stages.

    Matrices are decayed, vectors (the norms' weights) are not: Megatron-Core's standard rule; the
    report gives none. The learning rate is set at each step from the run's recipe.

    Args:
        training: Optimizer settings of the run.
        chunks: Stages wrapped in DistributedDataParallel.
        groups: The run's process groups.
        precision: "bf16" or "fp32", of the weights.
    """
    config = OptimizerConfig(
        optimizer="adam",
        lr=training.lr,
        min_lr=training.min_lr,
        weight_decay=training.weight_decay,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        adam_eps=training.adam_eps,
        clip_grad=training.clip_grad,
        bf16=precision == "bf16",
        params_dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        use_distributed_optimizer=True,
    )
    optimizer = get_megatron_optimizer(config, chunks, use_gloo_process_groups=False, pg_collection=groups)
    for group in optimizer.param_groups:
        # Megatron-Core marks the vectors' group and leaves the rest to its own scheduler of settings, which no run has.
        group["weight_decay"] = training.weight_decay * group["wd_mult"]
    shards = list(master_shards(optimizer, chunks, groups))
    gathers_late = any(buckets.gathers_late for buckets in buckets_of(chunks))
    for part in optimizer_chain(optimizer):  # one without parameters here would gather those of the others
        part._defer_param_sync = gathers_late
    for part in distributed_parts(optimizer):
        if "bf16" in (training.exp_avg_dtype, training.exp_avg_sq_dtype):
            part.optimizer = _with_narrow_moments(training, part, shards)
        elif isinstance(part.optimizer, torch.optim.AdamW):
            # Without Transformer Engine or apex, Megatron-Core takes torch's AdamW as it comes: several passes.
            for group in part.optimizer.param_groups:
                group.update(fused=True, foreach=False)
    logger.info("AdamW: moments %s and %s (%s)", training.exp_avg_dtype, training.exp_avg_sq_dtype,
                type(distributed_parts(optimizer)[0].optimizer).__module__)
    return optimizer


def _with_narrow_moments(training: TrainingConfig, part: Any, shards: list[ParameterShard]) -> NarrowMomentAdamW:
    return NarrowMomentAdamW(
        part.optimizer.param_groups, (shard for shard in shards if shard.part is part),
        exp_avg_dtype=_DTYPES[training.exp_avg_dtype], exp_avg_sq_dtype=_DTYPES[training.exp_avg_sq_dtype],
        is_stochastic=training.moment_rounding == "stochastic", seed=training.seed)


def set_learning_rate(optimizer: MegatronOptimizer, learning_rate: float) -> None:
    """Use `learning_rate` in every parameter group from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
