"""Published runs with failures: what is predicted is what the results and the page say."""

from __future__ import annotations

import dataclasses

import pytest

from dsv3_megatron.papers.published_failures import PUBLISHED_FAILURES
from dsv3_megatron.planning.goodput.failures import time_shares
from tools.bench.bench_goodput import config_of, measurements
from tools.bench.update_readme import newest

RENEW = "run python -m tools.bench.bench_goodput and python -m tools.bench.update_readme"


def test_the_results_are_those_of_today() -> None:
    written = newest("goodput")
    for run in PUBLISHED_FAILURES:
        for row in measurements(run):
            assert float(written[config_of(run), row.name][row.metric]["value"]) == pytest.approx(
                row.value, rel=1e-4), f"{run.name}: {RENEW}"
    assert {config for config, _ in written} == {config_of(run) for run in PUBLISHED_FAILURES}, RENEW


def test_lower_bounds_are_met_and_the_miss_is_known() -> None:
    for run in PUBLISHED_FAILURES:
        if run.is_lower_bound:
            assert run.predicted > run.published, run.name
    bloom = PUBLISHED_FAILURES[-1]
    assert 0.04 < bloom.predicted - bloom.published < 0.06


def test_the_restart_that_explains_does() -> None:
    for run in PUBLISHED_FAILURES:
        there = dataclasses.replace(run.failures, restart_seconds=run.explaining_restart_seconds)
        assert time_shares(there, run.interval).training == pytest.approx(run.published)


def test_what_was_published_does_not_move_a_prediction() -> None:
    run = PUBLISHED_FAILURES[0]
    assert dataclasses.replace(run, published=0.5).predicted == run.predicted
