"""AdamW with fp32 master weights and main gradients, its state sharded over the data-parallel ranks (ZeRO-1)."""

from __future__ import annotations

import torch
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.process_groups_config import ProcessGroupCollection

from dsv3_megatron.config.training import TrainingConfig


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
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        # Without Transformer Engine or apex, Megatron-Core takes torch's AdamW as it comes: several passes.
        if isinstance(part.optimizer, torch.optim.AdamW):
            for group in part.optimizer.param_groups:
                group.update(fused=True, foreach=False)
    return optimizer


def set_learning_rate(optimizer: MegatronOptimizer, learning_rate: float) -> None:
    """Use `learning_rate` in every parameter group from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
