"""What a run does when a step is not what it should be: NaN or Inf, a spike, a rank that has stopped.

Plain frozen data, no torch. `guards/` says how each is found and what follows.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv3_megatron.config.fields import ConfigError, option, require_finite
from dsv3_megatron.config.training import CheckpointConfig

ON_SPIKE = ("log", "skip", "rollback")
# What may take long without a sign of life (the first step, checkpoints, validation) has this many times as long.
SLOW_FACTOR = 10.0
# Seconds in which the watchdogs of all ranks report a hang and end their processes, at the most.
REPORT_S = 60.0
# Seconds that a message waits for its peer where nobody watches.
UNWATCHED_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class GuardConfig:
    """Thresholds of the guards. A step with NaN or Inf is never applied; the rest is a choice.

    The statistic of a spike is median + threshold x 1.4826 x median absolute deviation, over the last good steps, of
    the loss and of the logarithm of the gradient norm.
    """

    on_spike: str = option("log", choices=ON_SPIKE, help="what follows a spike: log it; skip: leave its update out; "
                           "rollback: go back to the last checkpoint, and past the data since")
    spike_window: int = option(128, help="good steps that a step is compared with")
    spike_min_steps: int = option(32, help="good steps before any is judged; as many flagged in a row are a new level")
    spike_loss_threshold: float = option(8.0, help="robust standard deviations above the median loss that are a spike; "
                                         "0: the loss is not judged")
    spike_loss_floor: float = option(0.25, help="smallest rise above the median loss that is a spike, nats per token")
    spike_grad_norm_threshold: float = option(8.0, help="robust standard deviations, of the logarithm, above the "
                                              "median gradient norm that are a spike; 0: the norm is not judged")
    spike_grad_norm_floor: float = option(10.0, help="smallest multiple of the median gradient norm that is a spike")
    max_consecutive_skips: int = option(5, help="updates left out in a row that a run survives; one more ends it")
    max_rollbacks: int = option(3, help="rollbacks that a run survives; one more ends it with a report")
    hang_timeout_s: float = option(300.0, most=1e7, help="seconds without a sign of life inside a step until a rank "
                                   "counts as hung, all stacks are written and the run ends; 0: never")

    @property
    def collective_timeout_s(self) -> float:
        """Seconds after which NCCL or gloo gives up a message whose peer does not come, and ends the process.

        Always behind the watchdog's report, which says which rank was where, as NCCL's error does not. A rank that
        stops is reported `SLOW_FACTOR * hang_timeout_s` after its last sign of life, at the latest. What others wait
        for from it they may have posted before, by as long as they too may go without a sign of life.
        """
        watched_s = (SLOW_FACTOR + 1) * self.hang_timeout_s
        return max(UNWATCHED_TIMEOUT_S, watched_s + REPORT_S if watched_s else 0.0)

    def validate(self, checkpoint: CheckpointConfig) -> None:
        """Check the thresholds, and that a rollback has something to go back to.

        Raises:
            ConfigError: one message with the rule, the values, the field and the way out.
        """
        require_finite(self)
        if self.on_spike not in ON_SPIKE:
            raise ConfigError(f"on_spike={self.on_spike!r} must be one of {', '.join(ON_SPIKE)}")
        if self.spike_min_steps < 2:
            raise ConfigError(f"spike_min_steps={self.spike_min_steps} must be at least 2: one step has no spread")
        if self.spike_window < self.spike_min_steps:
            raise ConfigError(f"spike_window={self.spike_window} must be at least spike_min_steps="
                              f"{self.spike_min_steps}, or no step would ever be judged")
        for name in ("spike_loss_threshold", "spike_grad_norm_threshold"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} must not be negative; 0 turns it off")
        for name in ("spike_loss_floor", "max_consecutive_skips", "max_rollbacks"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} must not be negative")
        if self.spike_grad_norm_floor < 1:
            raise ConfigError(f"spike_grad_norm_floor={self.spike_grad_norm_floor} must be at least 1: it multiplies "
                              "the median gradient norm")
        if self.hang_timeout_s < 0 or 0 < self.hang_timeout_s < 1:
            raise ConfigError(f"hang_timeout_s={self.hang_timeout_s} must be at least 1 second; 0 turns it off")
        if self.on_spike == "rollback" and not checkpoint.save:
            raise ConfigError("on_spike=rollback needs save: a folder of checkpoints to go back to; or choose "
                              "on_spike=skip")
