"""Drawn runs where the answer is known without chance."""

from __future__ import annotations

import dataclasses
import statistics

import pytest

from dsv3_megatron.planning.goodput.failure_events import draw_run
from dsv3_megatron.planning.goodput.failures import Failures

NEVER = Failures(1e9, 8, save_seconds=30, restart_seconds=600)


def test_without_failures_only_saves_are_added() -> None:
    run = draw_run(NEVER, 100, 1000, seed=1)
    assert (run.seconds, run.num_failures) == (1000 + 9 * 30, 0)
    assert draw_run(NEVER, 300, 1000, seed=1).seconds == 1000 + 3 * 30


def test_the_same_seed_draws_the_same_run() -> None:
    often = Failures(100, 1000, 5, 60)
    assert draw_run(often, 100, 1e5, seed=3) == draw_run(often, 100, 1e5, seed=3)
    assert draw_run(often, 100, 1e5, seed=3) != draw_run(often, 100, 1e5, seed=4)


def test_failures_come_as_often_as_they_should() -> None:
    often = Failures(100, 1000, 0, 0)
    runs = [draw_run(often, 10, 1e5, seed) for seed in range(20)]
    between = sum(run.seconds for run in runs) / sum(run.num_failures for run in runs)
    assert between == pytest.approx(often.seconds_between, rel=0.05)


def test_a_late_save_costs_the_interval_before_it() -> None:
    """Means of the same seeds: a save that is on disk d seconds later loses d seconds more at a failure."""
    at_once = Failures(100, 1000, 0, 0)
    late = dataclasses.replace(at_once, write_seconds=50)
    lost = [statistics.mean((run.seconds - 1e5) / run.num_failures for run in (
        draw_run(failures, 60, 1e5, seed) for seed in range(20))) for failures in (at_once, late)]
    assert lost[0] == pytest.approx(30, rel=0.1)
    assert lost[1] > lost[0] + 35


def test_without_a_spare_every_failure_waits_for_its_repair() -> None:
    job = Failures(100, 1000, 0, 0, spares=0, repair_hours=1)
    run = draw_run(job, 10, 720_000, seed=5)
    assert (run.seconds - 720_000) / run.num_failures == pytest.approx(3600 + 5, rel=0.1)
