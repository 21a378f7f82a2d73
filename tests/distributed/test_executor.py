"""The executor on processes and gloo: results, memory, times as the simulator says, pairs that overlap, a trace."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from dsv3_megatron.schedule.draw import plot_timeline, read_trace
from dsv3_megatron.schedule.plan import build_plan
from tests.distributed.executor_runs import NUM_PARTS, ON_THE_CLOCK, UNIT_S, pair_time, run_all
from tests.distributed.launch import run_ranks
from tests.unit.schedule.sizes import FORMS, form
from tools.bench.timed_stages import step_time

pytestmark = pytest.mark.distributed

NUM_COMPOSITIONS = 200


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    trace = tmp_path_factory.mktemp("trace") / "trace.json"
    started = time.monotonic()
    results = run_ranks(4, run_all, trace, NUM_COMPOSITIONS, timeout_s=240)
    return {"ranks": results, "trace": trace, "seconds": time.monotonic() - started, **results[0]}


def test_random_plans_over_gloo(runs: dict[str, Any]) -> None:
    """Schedule x PP x EP x micro-batches x layers: none hangs; checked where they ran: results, peaks, partners."""
    assert runs["ranks"][0]["compositions"][0] == NUM_COMPOSITIONS
    assert runs["ranks"][3]["compositions"][0] > NUM_COMPOSITIONS / 10
    assert runs["ranks"][0]["compositions"][1] > NUM_COMPOSITIONS / 10


@pytest.mark.parametrize("name", FORMS)
def test_a_step_takes_what_the_simulator_says(runs: dict[str, Any], name: str) -> None:
    """The executor's order over gloo gives the known times the sum that the simulator gives them."""
    step = runs["measured"][name]
    print(f"{name}: counted {step_time(step.counted):.3f} ms, simulated {step.simulated:.3f} ms")
    assert step_time(step.counted) == pytest.approx(step.simulated, rel=1e-9)


def test_the_clock_says_so_too(runs: dict[str, Any]) -> None:
    """Measured on the machine's own clock, a schedule is not faster than simulated, and one that hides is faster."""
    steps = {name: runs["measured"][name] for name in ON_THE_CLOCK}
    for name, step in steps.items():
        measured = step_time(step.on_the_clock)
        print(f"{name}: measured {measured:.0f} ms, simulated {step.simulated:.0f} ms")
        # A sleeper that was late catches up, also where its rank would have waited: a little less is possible.
        assert step.simulated / 1.05 < measured
    slow, fast = (step_time(steps[name].on_the_clock) for name in ON_THE_CLOCK)
    assert fast < 0.8 * slow


@pytest.mark.parametrize("name", ["dualpipe", "dualpipev", "interleaved with pairs"])
def test_pairs_hide_their_all_to_alls(runs: dict[str, Any], name: str) -> None:
    """A pair takes no more than its compute, with two thirds of that in all-to-alls; in turn it were 5/3."""
    scale = NUM_PARTS / form(name, 4, 8).num_stages
    compute = 3 * scale * UNIT_S * 1000
    assert pair_time(runs["measured"][name].counted) == pytest.approx(compute, rel=1e-9)


def test_a_trace_is_a_timeline(runs: dict[str, Any], tmp_path: Path) -> None:
    plan, timeline = read_trace(runs["trace"])
    assert plan == build_plan("dualpipev", num_ranks=4, num_microbatches=8)
    for actions, spans in zip(plan.actions, timeline, strict=True):
        assert tuple(span.action for span in spans) == actions
        assert all(0 <= span.start <= span.end for span in spans)
        assert all(before.end <= after.start for before, after in zip(spans, spans[1:], strict=False))
    plot_timeline(plan, timeline, tmp_path / "measured.png")
    assert (tmp_path / "measured.png").stat().st_size > 10_000
