"""Options that trade memory against arithmetic or exactness, and their rules. No torch."""

from __future__ import annotations

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.config.training import MOMENT_DTYPES, MOMENT_ROUNDINGS, RECOMPUTE_GRANULARITIES, TrainingConfig

# What the report recomputes (section 3.2.3), in Megatron-Core's spelling.
RECOMPUTE_MODULES = ("layernorm", "mla_up_proj", "moe_act")


def recomputed_modules(training: TrainingConfig) -> tuple[str, ...]:
    """Names of the modules to recompute: those given, all of the report's if none are; empty without "selective"."""
    if training.recompute_granularity != "selective":
        return ()
    return training.recompute_modules or RECOMPUTE_MODULES


def require_recompute(training: TrainingConfig, model: ModelConfig) -> None:
    """Check what is recomputed.

    Raises:
        ConfigError: names that no module has, or granularity and names that do not go together.
    """
    granularity, names = training.recompute_granularity, training.recompute_modules
    if granularity not in (None, *RECOMPUTE_GRANULARITIES):
        raise ConfigError(f"recompute_granularity={granularity!r} must be one of {', '.join(RECOMPUTE_GRANULARITIES)}, "
                          "or none")
    if names and granularity != "selective":
        raise ConfigError(f"recompute_modules={' '.join(names)} needs recompute_granularity=selective, not "
                          f"{granularity or 'none'}{': full recomputes whole layers' * (granularity == 'full')}")
    unknown = [name for name in names if name not in RECOMPUTE_MODULES]
    if unknown:
        raise ConfigError(f"recompute_modules={' '.join(unknown)}: the modules that can be recomputed are "
                          f"{', '.join(RECOMPUTE_MODULES)}")
    if "moe_act" in names and not model.num_moe_layers:
        raise ConfigError(f"recompute_modules=moe_act matches nothing: all {model.num_layers} layers are dense "
                          f"(num_dense_layers={model.num_dense_layers}); leave it out")


def require_moments(training: TrainingConfig) -> None:
    """Check the dtypes of AdamW's moments and the decay of the weights' average.

    Raises:
        ConfigError: a value that is not among the choices or out of its range.
    """
    for name, allowed in (("exp_avg_dtype", MOMENT_DTYPES), ("exp_avg_sq_dtype", MOMENT_DTYPES),
                          ("moment_rounding", MOMENT_ROUNDINGS)):
        if getattr(training, name) not in allowed:
            raise ConfigError(f"{name}={getattr(training, name)!r} must be one of {', '.join(allowed)}")
    if not 0 <= training.ema_decay < 1:
        raise ConfigError(f"ema_decay={training.ema_decay} must be at least 0 and less than 1; 0 keeps no average")
    if training.eval_ema and not training.ema_decay:
        raise ConfigError("eval_ema=True needs an average of the weights: set ema_decay, for example to 0.999")
