"""A planned run with failures: what is not given in seconds from bytes, the best interval, and how runs spread."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.planning.goodput.failure_events import draw_run
from dsv3_megatron.planning.goodput.failures import Failures, TimeShares, best_interval, time_shares

# Until ranks have started, met and built their groups, and the node is replaced, beside reading the checkpoint.
START_SECONDS = 300.0
_MOST_EVENTS = 2_000_000
_MOST_RUNS, _FEWEST_RUNS = 200, 20
_DAY = 86400.0


@dataclass(frozen=True)
class FailureFlags:
    """What the command was told of failures; None: not given.

    Attributes:
        mtbf_hours_per_gpu: Mean hours of a GPU between two stops of the job.
        save_seconds: Seconds that training waits for a save.
        write_seconds: Seconds from there until it is on disk.
        restart_seconds: Seconds from a failure until training goes on.
        spares: Nodes that wait to replace others.
        repair_hours: Mean hours of a repair.
        storage_gb_per_second: Bandwidth of the storage for the whole run, in GB/s.
        host_copy_gb_per_second: Bandwidth at which a GPU copies its part to its host, in GB/s, where a save is written
            behind training.
    """

    mtbf_hours_per_gpu: float
    save_seconds: float | None = None
    write_seconds: float | None = None
    restart_seconds: float | None = None
    spares: int | None = None
    repair_hours: float = 24.0
    storage_gb_per_second: float | None = None
    host_copy_gb_per_second: float | None = None

    def failures(self, num_gpus: int, checkpoint_bytes: int) -> tuple[Failures, tuple[str, ...]]:
        """The job's failures, with seconds from bytes where they are not given, and what is to be said of that.

        Raises:
            ConfigError: neither seconds nor a bandwidth are given, or a number cannot be.
        """
        for flag, value in (("--storage-gb-per-second", self.storage_gb_per_second),
                            ("--host-copy-gb-per-second", self.host_copy_gb_per_second)):
            if value is not None and not value > 0:
                raise ConfigError(f"{flag}={value:g} must be greater than 0; leave it out")
        on_storage = self._storage_seconds(checkpoint_bytes)
        notes = []
        save, write = self.save_seconds, self.write_seconds or 0.0
        if save is None:
            save = self._needed("--checkpoint-seconds", on_storage)
            if self.host_copy_gb_per_second is not None:
                write = save if self.write_seconds is None else write
                save = checkpoint_bytes / num_gpus / (self.host_copy_gb_per_second * 1e9)
                notes.append(f"{checkpoint_bytes / num_gpus / 1e9:.3g} GB of each GPU are copied to its host, evenly")
        restart = self.restart_seconds
        if restart is None:
            restart = START_SECONDS + self._needed("--restart-seconds", on_storage)
            notes.append(f"a restart is {START_SECONDS:g} s until ranks have met (not confirmed by a source) and the "
                         "reading of a checkpoint")
        failures = Failures(self.mtbf_hours_per_gpu, num_gpus, save, restart, write, self.spares, self.repair_hours)
        failures.validate()
        return failures, tuple(notes)

    def _storage_seconds(self, num_bytes: int) -> float | None:
        return None if self.storage_gb_per_second is None else num_bytes / (self.storage_gb_per_second * 1e9)

    @staticmethod
    def _needed(flag: str, seconds: float | None) -> float:
        if seconds is None:
            raise ConfigError(f"{flag} is not given; give it, or --storage-gb-per-second, the bandwidth of the storage "
                              "for the whole run, from which it follows")
        return seconds


@dataclass(frozen=True)
class DrawnSpread:
    """What runs drawn at random took.

    Attributes:
        num_runs: Runs that were drawn.
        mean_days: Mean of their days.
        low_days: Days that 5% of them stayed under.
        high_days: Days that 5% of them went over.
    """

    num_runs: int
    mean_days: float
    low_days: float
    high_days: float


@dataclass(frozen=True)
class RunGoodput:
    """A run with failures.

    Attributes:
        failures: How often it stops, and what that costs.
        notes: What was taken for what was not given.
        num_steps: Steps between two saves, the best whole number of them.
        shares: What the time is spent on with that interval.
        step_seconds: Seconds of a step.
        training_days: Days that the run would take without saves or failures.
        gpus: GPUs that are paid for, those of spare nodes too.
        spread: What runs drawn at random took; None where there would be too many events.
        own_interval: Steps between saves as the run has it (`save_interval`), and the share of time that counts then;
            None where a save would not be on disk in time.
        changed: Share of time that counts where one of the numbers is another, by what is changed, each with its best
            interval.
    """

    failures: Failures
    notes: tuple[str, ...]
    num_steps: int
    shares: TimeShares
    step_seconds: float
    training_days: float
    gpus: int
    spread: DrawnSpread | None
    own_interval: tuple[int, float] | None
    changed: Mapping[str, float]

    @property
    def days(self) -> float:
        """Mean days of the run; infinite where next to no time counts."""
        return self.training_days / self.shares.training if self.shares.training else math.inf

    @property
    def gpu_hours(self) -> float:
        """Mean GPU-hours of the run, with those of spare nodes."""
        return self.days * 24 * self.gpus


def plan_goodput(flags: FailureFlags, *, num_gpus: int, gpus_per_node: int, checkpoint_bytes: int, step_seconds: float,
                 training_days: float, save_interval: int | None = None) -> RunGoodput:
    """Plan a run with failures.

    Args:
        flags: What is known of failures, saves and restarts.
        num_gpus: GPUs of the run.
        gpus_per_node: GPUs of a node, for spares.
        checkpoint_bytes: Size of a checkpoint.
        step_seconds: Seconds of a step.
        training_days: Days of training without saves or failures.
        save_interval: Steps between saves that the run asks for, to be put beside the best; None: it is left out.

    Raises:
        ConfigError: a number is missing or cannot be.
    """
    failures, notes = flags.failures(num_gpus, checkpoint_bytes)
    num_steps = _best_steps(failures, step_seconds)
    shares = time_shares(failures, num_steps * step_seconds)
    own = None
    if save_interval:
        try:
            own = save_interval, time_shares(failures, save_interval * step_seconds).training
        except ConfigError:
            own = None
    return RunGoodput(
        failures, notes, num_steps, shares, step_seconds, training_days, num_gpus + (failures.spares or 0) *
        gpus_per_node, _spread(failures, num_steps * step_seconds, training_days, shares.training), own,
        _changed(failures, step_seconds))


def _best_steps(failures: Failures, step_seconds: float) -> int:
    """The best whole number of steps between two saves."""
    least = max(1, math.ceil((failures.write_seconds - failures.save_seconds) / step_seconds - 1e-9))
    steps = best_interval(failures, least_seconds=step_seconds) / step_seconds
    around = {max(least, math.floor(steps)), max(least, math.ceil(steps))}
    return max(around, key=lambda count: time_shares(failures, count * step_seconds).training)


def _changed(failures: Failures, step_seconds: float) -> dict[str, float]:
    cases = {"failures twice as often": failures.scaled(mtbf_hours_per_gpu=0.5),
             "failures half as often": failures.scaled(mtbf_hours_per_gpu=2.0),
             "a restart twice as long": failures.scaled(restart_seconds=2.0),
             "a save twice as long": failures.scaled(save_seconds=2.0, write_seconds=2.0)}
    return {name: time_shares(case, _best_steps(case, step_seconds) * step_seconds).training
            for name, case in cases.items()}


def _spread(failures: Failures, interval: float, training_days: float, share: float) -> DrawnSpread | None:
    work = training_days * _DAY
    if not share or not work:
        return None
    # A save is three events; a failure's start two.
    events = work / interval * 3 + work / share / failures.seconds_between * 2 + 3
    num_runs = min(_MOST_RUNS, int(_MOST_EVENTS / events))
    if num_runs < _FEWEST_RUNS:
        return None
    days = sorted(draw_run(failures, interval, work, seed).seconds / _DAY for seed in range(num_runs))
    tail = max(1, round(0.05 * num_runs))
    return DrawnSpread(num_runs, sum(days) / num_runs, days[tail - 1], days[-tail])
