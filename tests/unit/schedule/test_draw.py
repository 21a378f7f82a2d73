"""Pictures are written for every schedule and size; the trace holds what the timeline holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsv3_megatron.schedule.draw import plot_timeline, trace_events, write_trace
from dsv3_megatron.schedule.plan import Plan, build_plan
from dsv3_megatron.schedule.simulate import Costs, Simulation, simulate
from dsv3_megatron.schedule.timeline import Span


def simulated(plan: Plan, overlapped: float = 2.5) -> Simulation:
    return simulate(plan, Costs.uniform(plan.num_stages, forward=1, backward=2, weight=1, overlapped=overlapped))


@pytest.mark.parametrize(("schedule", "num_ranks", "num_microbatches"), [
    ("1f1b", 1, 1), ("interleaved", 2, 4), ("dualpipev", 4, 8), ("zb1p", 4, 6)])
def test_png_is_written(schedule: str, num_ranks: int, num_microbatches: int, tmp_path: Path) -> None:
    plan = build_plan(schedule, num_ranks=num_ranks, num_microbatches=num_microbatches)
    path = tmp_path / "plan.png"
    plot_timeline(plan, simulated(plan).timeline, path)
    from PIL import Image

    with Image.open(path) as image:
        assert image.format == "PNG" and image.size[0] > 1000
        colors = {color for _, color in image.convert("RGB").getcolors(100_000)}
        assert {(0x3b, 0x76, 0xc4), (0xf3, 0xf4, 0xf6)} <= colors or num_ranks == 1  # forwards, waiting
        assert (0x3b, 0x76, 0xc4) in colors


def test_measured_times_far_apart_fit_on_the_page(tmp_path: Path) -> None:
    """Seconds instead of units, one action a thousand times shorter than the others."""
    plan = build_plan("1f1b", num_ranks=2, num_microbatches=4)
    measured = [[Span(span.action, span.start * 1e-3, span.end * 1e-3) for span in spans]
                for spans in simulated(plan).timeline]
    first = measured[0][0]
    measured[0][0] = Span(first.action, first.start, first.start + 1e-6)
    plot_timeline(plan, tuple(map(tuple, measured)), tmp_path / "plan.png", title="measured")
    from PIL import Image

    with Image.open(tmp_path / "plan.png") as image:
        assert image.size[0] < 6000


def test_trace(tmp_path: Path) -> None:
    plan = build_plan("dualpipe", num_ranks=4, num_microbatches=8)
    result = simulated(plan)
    write_trace(plan, result.timeline, tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert events == trace_events(plan, result.timeline)
    for rank, spans in enumerate(result.timeline):
        own = [event for event in events if event["ph"] == "X" and event["tid"] == rank]
        assert [(event["ts"], event["ts"] + event["dur"], event["name"]) for event in own] == [
            (span.start * 1000, span.end * 1000, str(span.action)) for span in spans]
        held = [event["args"]["chunks"] for event in events
                if event["ph"] == "C" and event["name"] == f"activations, rank {rank}"]
        assert max(held) == result.peak_activations[rank] and held[-1] == 0
    pair = next(event for event in events if event.get("cat") == "FB")
    assert set(pair["args"]) == {"F", "B"} and pair["args"]["F"].startswith("stage ")
    assert {event["args"]["name"] for event in events if event["name"] == "thread_name"} == {
        f"rank {rank}" for rank in range(4)}


def test_nothing_to_draw(tmp_path: Path) -> None:
    plan = build_plan("1f1b", num_ranks=2, num_microbatches=1)
    for draw in (plot_timeline, write_trace):
        with pytest.raises(ValueError, match="holds no action that takes time"):
            draw(plan, ((), ()), tmp_path / "nothing")
        with pytest.raises(ValueError, match="the timeline has 1 ranks and the plan 2"):
            draw(plan, ((),), tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
