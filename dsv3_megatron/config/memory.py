"""Options that trade memory against arithmetic or exactness, and their rules. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsv3_megatron.config.fields import ConfigError

if TYPE_CHECKING:
    from dsv3_megatron.config.training import TrainingConfig

MOMENT_DTYPES = ("fp32", "bf16")
MOMENT_ROUNDINGS = ("stochastic", "nearest")


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
