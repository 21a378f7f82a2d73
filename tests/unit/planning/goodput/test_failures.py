"""The closed form of a job with failures, beside drawn events, brute force and the formulas of others."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.papers.published_failures import RSC1_HOURS_PER_GPU
from dsv3_megatron.planning.goodput.failure_events import draw_run
from dsv3_megatron.planning.goodput.failures import (
    Failures,
    best_interval,
    time_shares,
    waiting_share,
    young_interval,
)

# The job, the interval, how many failures one drawn run has.
JOBS = {
    "a large job": (Failures(45_600, 16_384, 30, 600), 600, 3000),
    "saves that are late": (Failures(10_000, 16_384, 30, 300, write_seconds=200), 400, 3000),
    "half of the time lost": (Failures(5_000, 16_384, 60, 400), 500, 3000),
    "enough spares": (Failures(45_600, 16_384, 30, 600, spares=20), 600, 3000),
    "too few spares, short repairs": (Failures(1_000, 2_048, 10, 100, spares=3, repair_hours=1), 300, 6000),
}


@pytest.mark.parametrize("name", JOBS)
def test_formula_and_drawn_events_agree_within_a_percent(name) -> None:
    failures, interval, num_failures = JOBS[name]
    work = num_failures * failures.seconds_between
    drawn = sum(draw_run(failures, interval, work, seed).seconds for seed in range(3)) / 3
    assert work / drawn == pytest.approx(time_shares(failures, interval).training, rel=0.01)


def test_shares_add_up() -> None:
    for failures, interval, _ in JOBS.values():
        shares = dataclasses.asdict(time_shares(failures, interval))
        assert sum(shares.values()) == pytest.approx(1) and min(shares.values()) >= 0


def test_the_best_interval_is_that_of_brute_force() -> None:
    for failures, _, _ in JOBS.values():
        best = best_interval(failures)
        least = failures.write_seconds - failures.save_seconds
        tried = [factor * best for factor in np.geomspace(0.2, 5, 4001) if factor * best >= least]
        found = max(tried, key=lambda interval: time_shares(failures, interval).training)
        assert best == pytest.approx(found, rel=2e-3)


def test_young_is_the_first_term() -> None:
    failures = Failures(1e6, 1000, 1e-3, 10)
    assert best_interval(failures) == pytest.approx(young_interval(failures), rel=1e-3)
    assert best_interval(dataclasses.replace(failures, save_seconds=1e4)) < young_interval(
        dataclasses.replace(failures, save_seconds=1e4))
    assert best_interval(dataclasses.replace(failures, save_seconds=0.0), least_seconds=20) == 20


def test_expected_ettr_of_kokolis_et_al() -> None:
    """Their expression for large jobs holds to first order: "Revisiting Reliability", 2025, expected ETTR."""
    for num_gpus in (2048, 8192, 16384):
        failures = Failures(RSC1_HOURS_PER_GPU, num_gpus, 10, 120)
        interval = 300.0
        theirs = (1 - (failures.restart_seconds + interval / 2) / failures.seconds_between) / (1 + 10 / interval)
        assert time_shares(failures, interval).training == pytest.approx(theirs, rel=0.005)


def test_mean_time_to_failure_of_kokolis_et_al() -> None:
    assert Failures(RSC1_HOURS_PER_GPU, 16_384, 0, 0).seconds_between / 3600 == pytest.approx(1.8, rel=0.02)
    assert Failures(RSC1_HOURS_PER_GPU, 131_072, 0, 0).seconds_between / 3600 == pytest.approx(0.23, rel=0.03)


@pytest.mark.parametrize(("spares", "hours"), [(0, 10.0), (2, 48.0), (7, 200.0)])
def test_waiting_is_the_chain_of_broken_nodes(spares, hours) -> None:
    """Stationary distribution of the chain of nodes in repair, by linear algebra."""
    failures = Failures(45_600, 4_096, 30, 600, spares=spares, repair_hours=hours)
    size, up, down = spares + 2, 1 / failures.seconds_between, 1 / (hours * 3600)
    rates = np.zeros((size, size))
    for state in range(size - 1):
        rates[state, state + 1], rates[state + 1, state] = up, (state + 1) * down
    rates -= np.diag(rates.sum(axis=1))
    system = np.vstack([rates.T / up, np.ones(size)])
    stationary = np.linalg.lstsq(system, np.append(np.zeros(size), 1.0), rcond=None)[0]
    assert waiting_share(failures) == pytest.approx(stationary[-1], rel=1e-6)
    assert waiting_share(dataclasses.replace(failures, spares=None)) == 0


def test_wrong_numbers() -> None:
    good = Failures(45_600, 16_384, 30, 600)
    for change, message in (
            ({"mtbf_hours_per_gpu": 0.0}, "--mtbf-hours-per-gpu=0 must be greater than 0"),
            ({"save_seconds": -1.0}, "--checkpoint-seconds=-1 must be at least 0"),
            ({"restart_seconds": math.nan}, "--restart-seconds=nan must be at least 0"),
            ({"spares": -1}, "--spares=-1 must be at least 0 and at most the GPUs, 16384"),
            ({"mtbf_hours_per_gpu": 10.0}, "such a job never trains")):
        with pytest.raises(ConfigError, match=message):
            dataclasses.replace(good, **change).validate()
    with pytest.raises(ConfigError, match="takes 900 s to be written, longer than the 630 s from one to the next"):
        time_shares(dataclasses.replace(good, write_seconds=900), 600)
    with pytest.raises(ConfigError, match="must be greater than 0"):
        time_shares(good, 0)


def test_a_job_that_hardly_ever_saves_counts_next_to_nothing() -> None:
    assert time_shares(Failures(1, 1000, 1, 1), 1e5).training == 0
