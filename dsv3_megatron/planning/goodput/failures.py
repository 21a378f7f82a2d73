"""How often a job stops, what a stop costs, and what share of its time is left for training, in closed form.

Failures are a Poisson process over all GPUs of the job, also while it starts again. A job trains for t seconds (the
interval), waits d seconds for a save, which is on disk w seconds later, and so on. A failure takes it back to the last
save that was on disk, and r seconds later it trains again. With l failures a second and s = t + d, the share of time
that counts is

    (1 - B) * l t exp(-l (w + r)) / (exp(l s) - 1)

because after each start the k-th save is on disk if w + k s seconds pass without a failure, which has the probability
exp(-l (w + k s)), and a start takes exp(l r) / l seconds with what follows until the next failure. The best interval
solves 1 - l t = exp(-l (t + d)), where w and r have no part; sqrt(2 d / l) is its first term (Young). Without w and B
this is Daly's model.

B is the share of time in which more nodes are in repair than there are spares. Failures take a node each, and repairs
do not wait for each other: with a = failures in the time of a repair, B = Erlang's loss formula for S + 1 servers.

Sources: J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", 2006, eq. 20;
J. W. Young, 1974; A. K. Erlang, 1917. Delayed saves (w) are derived here.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from dsv3_megatron.config.fields import ConfigError

_MOST_SECONDS = 1e9


@dataclass(frozen=True)
class Failures:
    """How often a job stops, and what a save and a stop cost.

    Attributes:
        mtbf_hours_per_gpu: Mean hours of one GPU of the job between two stops of the job that it, or its share of
            nodes, network and software, is the cause of.
        num_gpus: GPUs of the job, without spares.
        save_seconds: Seconds that training waits for a save.
        write_seconds: Seconds from there until the save is on disk, while training goes on; 0: it is at once.
        restart_seconds: Seconds from a failure until training goes on, with a node to replace the lost one at hand.
        spares: Nodes that wait to replace others; None: there is always one.
        repair_hours: Mean hours until a node that failed is a spare again.
    """

    mtbf_hours_per_gpu: float
    num_gpus: int
    save_seconds: float
    restart_seconds: float
    write_seconds: float = 0.0
    spares: int | None = None
    repair_hours: float = 24.0

    def validate(self) -> None:
        """Check that the numbers can be.

        Raises:
            ConfigError: one of them cannot.
        """
        for flag, value, is_zero_allowed in (
                ("--mtbf-hours-per-gpu", self.mtbf_hours_per_gpu, False),
                ("--checkpoint-seconds", self.save_seconds, True),
                ("--checkpoint-write-seconds", self.write_seconds, True),
                ("--restart-seconds", self.restart_seconds, True), ("--repair-hours", self.repair_hours, False)):
            if not (0 <= value <= _MOST_SECONDS) or (value == 0 and not is_zero_allowed):
                least = "at least 0" if is_zero_allowed else "greater than 0"
                raise ConfigError(f"{flag}={value:g} must be {least} and at most {_MOST_SECONDS:g}")
        if self.spares is not None and not 0 <= self.spares <= self.num_gpus:
            raise ConfigError(f"--spares={self.spares} must be at least 0 and at most the GPUs, {self.num_gpus}; leave "
                              "it out if a lost node is always replaced at once")
        restart_failures = self.restart_seconds / self.seconds_between
        if restart_failures > 20:
            raise ConfigError(
                f"--restart-seconds={self.restart_seconds:g} is {restart_failures:.0f} times the mean time between "
                f"failures, {self.seconds_between:.3g} s for {self.num_gpus} GPUs: such a job never trains; give a "
                "shorter restart, a longer --mtbf-hours-per-gpu, or fewer GPUs")

    @property
    def seconds_between(self) -> float:
        """Mean seconds between two failures of the job."""
        return self.mtbf_hours_per_gpu * 3600 / self.num_gpus

    def scaled(self, **factors: float) -> Failures:
        """Multiply some of the numbers; the rest of the job stays as it is."""
        return dataclasses.replace(self, **{name: getattr(self, name) * factor for name, factor in factors.items()})


@dataclass(frozen=True)
class TimeShares:
    """What the time of a job with failures is spent on; the parts add up to 1.

    Attributes:
        training: Share of time whose training counts.
        saving: Share in which training waits for saves.
        repeated: Share of training and saving that a failure took back, and that was done again.
        restarting: Share in which the job starts again.
        waiting: Share in which no spare node is left.
    """

    training: float
    saving: float
    repeated: float
    restarting: float
    waiting: float


def waiting_share(failures: Failures) -> float:
    """Share of time in which the job waits for a repair, because more nodes are in repair than there are spares."""
    if failures.spares is None:
        return 0.0
    offered, blocked = failures.repair_hours * 3600 / failures.seconds_between, 1.0
    for servers in range(1, failures.spares + 2):
        blocked = offered * blocked / (servers + offered * blocked)
    return blocked


def time_shares(failures: Failures, interval_seconds: float) -> TimeShares:
    """Shares of time with a save after every `interval_seconds` of training.

    Raises:
        ConfigError: the interval is not positive, or a save is not on disk when the next one begins.
    """
    interval, save = interval_seconds, failures.save_seconds
    if not interval > 0:
        raise ConfigError(f"an interval of {interval:g} s between checkpoints must be greater than 0")
    if failures.write_seconds > (interval + save) * (1 + 1e-9):
        raise ConfigError(f"a checkpoint takes {failures.write_seconds:g} s to be written, longer than the "
                          f"{interval + save:g} s from one to the next; save less often")
    rate = 1 / failures.seconds_between
    cycle = rate * (interval + save)
    available = 1 - waiting_share(failures)
    kept = rate * math.exp(-rate * (failures.write_seconds + failures.restart_seconds))
    # expm1 would overflow where hardly an interval ends without a failure.
    kept *= 1 / math.expm1(cycle) if cycle < 700 else 0.0
    training, saving = available * kept * interval, available * kept * save
    restarting = available * -math.expm1(-rate * failures.restart_seconds)
    waiting = 1 - available
    return TimeShares(training, saving, max(0.0, 1 - training - saving - restarting - waiting), restarting, waiting)


def best_interval(failures: Failures, *, least_seconds: float = 0.0) -> float:
    """Seconds of training between two saves with which most of the time counts.

    Args:
        failures: The job.
        least_seconds: Shortest interval that there can be: a step.

    Returns:
        At least `least_seconds`, and long enough for a save to be on disk when the next begins.
    """
    rate = 1 / failures.seconds_between
    loss = rate * failures.save_seconds
    low, high = 0.0, 1.0
    while high - low > 1e-15 * high:  # log(1 - x) + x falls from 0 to minus infinity
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if math.log1p(-middle) + middle + loss > 0:
            low = middle
        else:
            high = middle
    return max((low + high) / 2 / rate if loss else 0.0, least_seconds,
               failures.write_seconds - failures.save_seconds)


def young_interval(failures: Failures) -> float:
    """The interval by Young's rule of thumb, sqrt(2 x save x mean time between failures), in seconds."""
    return math.sqrt(2 * failures.save_seconds * failures.seconds_between)
