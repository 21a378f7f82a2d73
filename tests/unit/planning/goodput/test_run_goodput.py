"""A planned run with failures: seconds from bytes, whole steps, the spread, and how it is told."""

from __future__ import annotations

import pytest

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.planning.goodput.failures import time_shares
from dsv3_megatron.planning.goodput.goodput_report import goodput_json, goodput_text
from dsv3_megatron.planning.goodput.run_goodput import START_SECONDS, FailureFlags, plan_goodput

RUN = {"num_gpus": 2048, "gpus_per_node": 8, "checkpoint_bytes": 8 * 10**12, "step_seconds": 20.0,
       "training_days": 20.0}


def test_seconds_follow_from_bytes() -> None:
    found = plan_goodput(FailureFlags(45_600, storage_gb_per_second=100), **RUN)
    assert found.failures.save_seconds == 80 and found.failures.write_seconds == 0
    assert found.failures.restart_seconds == START_SECONDS + 80
    behind = plan_goodput(FailureFlags(45_600, storage_gb_per_second=100, host_copy_gb_per_second=10), **RUN)
    assert behind.failures.save_seconds == pytest.approx(8e12 / 2048 / 10e9)
    assert behind.failures.write_seconds == 80
    assert behind.shares.training > found.shares.training
    assert behind.num_steps >= 4  # 80 s: the next save waits for the one before
    given = plan_goodput(FailureFlags(45_600, 12.0, 3.0, 100.0, storage_gb_per_second=100), **RUN).failures
    assert (given.save_seconds, given.write_seconds, given.restart_seconds) == (12, 3, 100)


def test_the_interval_is_the_best_whole_number_of_steps() -> None:
    found = plan_goodput(FailureFlags(45_600, 30.0, restart_seconds=600.0), save_interval=500, **RUN)
    shares = {steps: time_shares(found.failures, steps * 20.0).training for steps in range(1, 600)}
    assert found.num_steps == max(shares, key=shares.__getitem__)
    assert found.own_interval == (500, shares[500])
    assert found.changed["failures twice as often"] < found.shares.training < found.changed["failures half as often"]


def test_the_spread_holds_the_mean_and_spares_are_paid_for() -> None:
    found = plan_goodput(FailureFlags(5_000, 60.0, restart_seconds=900.0, spares=4, repair_hours=10.0), **RUN)
    assert found.spread is not None and found.spread.num_runs >= 20
    assert found.spread.low_days < found.days < found.spread.high_days
    assert found.spread.mean_days == pytest.approx(found.days, rel=0.02)
    assert found.gpus == 2048 + 4 * 8
    assert found.gpu_hours == pytest.approx(found.days * 24 * 2080)


def test_it_is_told() -> None:
    found = plan_goodput(FailureFlags(45_600, 30.0, restart_seconds=600.0, spares=8), save_interval=500, **RUN)
    text, told = goodput_text(found, 2.0), goodput_json(found, 2.0)
    for part in (f"(--save-interval {found.num_steps};", f"effective training time {found.shares.training:.1%}",
                 "with --save-interval 500, as the run has it", "64 GPUs of spare nodes", "runs drawn at random",
                 "failures twice as often", "one in 22.3 h (a GPU in 45,600 hours), a save 30 s, a restart 10 min"):
        assert part in text
    assert told["price"] == pytest.approx(2 * told["gpu_hours"])
    assert told["simulated"]["low_days"] < told["days"] < told["simulated"]["high_days"]
    assert sum(told["shares"].values()) == pytest.approx(1)
    assert told["own_save_interval"]["save_interval"] == 500


def test_what_is_missing_is_asked_for() -> None:
    with pytest.raises(ConfigError, match="--checkpoint-seconds is not given; give it, or --storage-gb-per-second"):
        plan_goodput(FailureFlags(45_600, restart_seconds=600.0), **RUN)
    with pytest.raises(ConfigError, match="--restart-seconds is not given"):
        plan_goodput(FailureFlags(45_600, 30.0), **RUN)
    with pytest.raises(ConfigError, match="--storage-gb-per-second=0 must be greater than 0"):
        plan_goodput(FailureFlags(45_600, storage_gb_per_second=0.0), **RUN)
