"""The settings of a supervised fine-tuning and of GRPO: the report's, and ours where it is silent. No torch."""

from __future__ import annotations

from typing import Any

from dsv3_megatron.config.run import RunConfig

# Times that a fine-tuning goes over its data. Source: DeepSeek-V3 report, section 5.1.
EPOCHS = 2.0
# Source: DeepSeek-V3 report, section 5.1.
_REPORTS: dict[str, Any] = {"sft": True, "lr": 5e-6, "min_lr": 1e-6, "lr_decay_style": "cosine"}
# The balance of a base model is not to be learnt anew on few sequences, parts of which are filling.
_OURS: dict[str, Any] = {"lr_warmup_iters": 0, "lr_decay_iters": None, "moe_router_bias_update_rate": 0.0,
                         "moe_aux_loss_coeff": 0.0, "ema_decay": 0.0, "eval_interval": 0}


def fine_tuned(run: RunConfig) -> RunConfig:
    """A run of the same model, layout and batch with the settings of a fine-tuning; its length is to be given.

    Args:
        run: A run, whose phases are left out.
    """
    return run.override(phases=(), stop_after_phase=None).override(**_REPORTS, **_OURS)


# The report gives no values for GRPO. Weights that the objective does not move, as those of MTP modules, shall stay.
_POLICYS: dict[str, Any] = {"sft": True, "lr": 1e-6, "min_lr": 1e-6, "lr_decay_style": "constant", "train_iters": 100,
                            "weight_decay": 0.0, "mtp_loss_scaling_factor": 0.0}


def policy_tuned(run: RunConfig) -> RunConfig:
    """A run of the same model, layout and batch with the settings of GRPO; its prompts are to be given.

    Args:
        run: A run, whose phases are left out.
    """
    return run.override(phases=(), stop_after_phase=None).override(**_OURS).override(**_POLICYS)
