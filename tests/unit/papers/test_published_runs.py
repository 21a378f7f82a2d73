"""Published runs: what is predicted is what the results and the page say, and nothing of it was fitted."""

from __future__ import annotations

import dataclasses

import pytest

from dsv3_megatron.metrics.flops import flops_per_token
from dsv3_megatron.papers.published_runs import PUBLISHED_RUNS, predict
from tools.bench.bench_published_runs import METRIC, config_of, measurements
from tools.bench.update_readme import newest

RENEW = "run python -m tools.bench.bench_published_runs and python -m tools.bench.update_readme"
# A prediction may move by so much before its row has to be written again.
TOLERANCE = 0.05
# Published TFLOP/s of a GPU beside the tokens a second, by the same page.
PUBLISHED_TFLOPS = {("Megatron-Bridge 25.09", "h100"): 338, ("Megatron-Bridge 25.11", "b200"): 557,
                    ("Megatron-Bridge 26.04.01", "b200"): 864, ("Megatron-Bridge 25.11, BF16", "gb200"): 782,
                    ("Megatron-Bridge 25.11", "gb200"): 1003, ("Megatron-Bridge 26.08", "gb200"): 1276,
                    ("Megatron-Bridge 25.11, BF16", "gb300"): 961, ("Megatron-Bridge 26.08", "gb300"): 1635}


@pytest.fixture(scope="module")
def predictions():
    return [predict(run) for run in PUBLISHED_RUNS]


def test_the_results_are_those_of_today(predictions) -> None:
    written = newest("published_runs")
    for prediction in predictions:
        for row in measurements(prediction):
            assert float(written[config_of(prediction), row.name][METRIC]["value"]) == pytest.approx(
                row.value, rel=TOLERANCE), f"{prediction.published.name}: {RENEW}"
    known = {config_of(prediction) for prediction in predictions}
    assert {config for config, _ in written} == known, RENEW


def test_published_tokens_are_those_of_the_published_operations() -> None:
    """Both columns of the same page, by this library's operations of a token: that MTP is in or not is right."""
    for run in PUBLISHED_RUNS:
        if (key := (run.name, run.hardware)) in PUBLISHED_TFLOPS:
            model = run.run().model
            flops = flops_per_token(model, 4096).training * run.tokens_per_second
            assert flops / 1e12 == pytest.approx(PUBLISHED_TFLOPS[key], rel=0.01), key


def test_every_run_has_an_address_and_a_reason(predictions) -> None:
    for prediction in predictions:
        run = prediction.published
        assert run.address.startswith("https://") and run.layout()
        assert (prediction.step is None) == (run.changes is None) == (prediction.distance is None)
        assert run.changes is not None or "FSDP" in run.other or "as above" in run.other
    assert {run.hardware for run in PUBLISHED_RUNS} == {"h800", "h100", "b200", "gb200", "gb300"}


def test_a_run_that_cannot_be_planned_says_why() -> None:
    run = next(run for run in PUBLISHED_RUNS if run.changes is None)
    with pytest.raises(ValueError, match="torchtitan, BF16, DeepEP on b200 cannot be planned: weights are sharded"):
        run.run()


def test_what_was_published_does_not_move_a_prediction() -> None:
    run = PUBLISHED_RUNS[0]
    twice = predict(dataclasses.replace(run, tokens_per_second=2 * run.tokens_per_second))
    once = predict(run)
    assert twice.tokens_per_second == once.tokens_per_second
    assert (twice.distance + 1) * 2 == pytest.approx(once.distance + 1)
