"""Pictures of a timeline, simulated or measured: a Gantt chart as PNG, a trace that Chrome and Perfetto open.

Usage:
    plot_timeline(plan, result.timeline, "schedule.png")        # or draw_timeline(...), a figure in a notebook
    write_trace(plan, result.timeline, "schedule.json")

Rows are ranks. Colours tell forward, backward, its input part and its weight part; chunk 0 is the strong shade, later
chunks are lighter. A pair is drawn as one framed block, the forward above the backward.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

from dsv3_megatron.config.json_files import read_json
from dsv3_megatron.config.output import json_text
from dsv3_megatron.schedule.actions import Action, Kind, Operation
from dsv3_megatron.schedule.plan import Plan, build_plan
from dsv3_megatron.schedule.timeline import Span, Timeline
from dsv3_megatron.schedule.validate import peak_activations

_INK, _MUTED = "#1f2937", "#6b7280"
# By kind: the colour of chunk 0 and of the last chunk; those between are mixed.
_COLORS = {
    Kind.FORWARD: ("#3b76c4", "#b4cff0"),
    Kind.BACKWARD: ("#2f9e62", "#b3e2c5"),
    Kind.BACKWARD_INPUT: ("#17a2a8", "#b0e4e6"),
    Kind.BACKWARD_WEIGHT: ("#d9822b", "#f6d3a8"),
}
_NAMES = {Kind.FORWARD: "forward", Kind.BACKWARD: "backward", Kind.BACKWARD_INPUT: "backward, input part",
          Kind.BACKWARD_WEIGHT: "backward, weight part"}
_ROW_INCHES = 0.42
_MIN_INCHES, _MAX_INCHES = 9.0, 44.0
_CELL_INCHES = 0.24  # the shortest action is drawn this wide if the chart may become that wide
_POINTS_PER_INCH = 72.0
_DIGIT = 0.62  # width of a digit, in font sizes
_ROUNDING = 1e-9  # of the times of a trace, as a share of its end
_MICROSECONDS = 1000.0  # of the trace for a unit of time: a unit shows as a millisecond


def plot_timeline(plan: Plan, timeline: Timeline, path: str | Path, *, title: str = "") -> None:
    """Write a PNG Gantt chart: what each rank runs when, with the micro-batch in each block and the waiting in grey.

    Args:
        plan: The plan that was run.
        timeline: Spans from `simulate`, or measured; any unit of time.
        path: File to write; its folder must exist.
        title: Heading; by default the schedule and its sizes.

    Raises:
        ValueError: the timeline has no action, or not the plan's ranks.
    """
    draw_timeline(plan, timeline, title=title).savefig(str(path))


def draw_timeline(plan: Plan, timeline: Timeline, *, title: str = "") -> Any:
    """Draw a Gantt chart as a figure of matplotlib, which a notebook shows.

    Args:
        plan: The plan that was run.
        timeline: Spans from `simulate`, or measured; any unit of time.
        title: Heading; by default the schedule and its sizes.

    Raises:
        ValueError: the timeline has no action, or not the plan's ranks.
    """
    end = _check(plan, timeline)
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # without pyplot: no window, and no backend is chosen for the caller

    shortest = min(float(span.end - span.start) for spans in timeline for span in spans if span.end > span.start)
    width = min(max(end / shortest * _CELL_INCHES, _MIN_INCHES), _MAX_INCHES)
    height = plan.num_ranks * _ROW_INCHES + 1.5
    with rc_context({"font.family": "DejaVu Sans", "axes.edgecolor": "#9ca3af"}):
        figure = Figure(figsize=(width + 2.4, height), dpi=110)
        axes = figure.subplots()
        figure.subplots_adjust(left=0.8 / (width + 2.4), right=(width + 0.8) / (width + 2.4),
                               bottom=0.85 / height, top=1 - 0.5 / height)
        _draw_blocks(axes, plan, timeline, inches_per_unit=width / end)
        _draw_frame(axes, plan, timeline, end)
        axes.set_title(title or _title(plan), loc="left", fontsize=12, fontweight="bold", color=_INK)
        _draw_legend(axes, plan, timeline, offset=-0.34 / (height - 1.35))
    return figure


def write_trace(plan: Plan, timeline: Timeline, path: str | Path) -> None:
    """Write the timeline as JSON in the Trace Event Format, for chrome://tracing and ui.perfetto.dev.

    One thread a rank; a counter a rank has the chunks whose activations it holds. One unit of time is shown as 1 ms.

    Raises:
        ValueError: the timeline has no action, or not the plan's ranks.
    """
    _check(plan, timeline)
    sizes = {"schedule": plan.schedule, "num_ranks": plan.num_ranks, "num_microbatches": plan.num_microbatches,
             "virtual_stages": plan.num_chunks, "is_overlapped": plan.is_overlapped}
    Path(path).write_text(json_text({"traceEvents": trace_events(plan, timeline), "displayTimeUnit": "ms",
                                      "otherData": sizes}) + "\n", encoding="utf-8")


def read_trace(path: str | Path) -> tuple[Plan, Timeline]:
    """Read what `write_trace` wrote, simulated or measured.

    Raises:
        ValueError: the file is none of these.
    """
    try:
        content = read_json(Path(path))
        sizes = dict(content["otherData"])
        events = [event for event in content["traceEvents"] if event["ph"] == "X"]
        if len(events) < sizes["num_ranks"] * sizes["num_microbatches"]:
            raise ValueError(f"it has {len(events)} actions, fewer than one for each of {sizes['num_microbatches']} "
                             f"micro-batches on each of {sizes['num_ranks']} ranks")
        plan = build_plan(sizes.pop("schedule"), **sizes)
        blocks: list[list[dict[str, Any]]] = [[] for _ in range(plan.num_ranks)]
        for event in events:
            blocks[event["tid"]].append(event)
        timeline = tuple(
            tuple(_span(action, event) for action, event in zip(actions, events, strict=True))
            for actions, events in zip(plan.actions, blocks, strict=True))
        _check(plan, timeline)
    except (OSError, KeyError, TypeError, IndexError, ValueError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{path} is no trace of a schedule as --trace and --trace-schedule write it: {error}"
                         ) from error
    return plan, timeline


def _span(action: Action, event: dict[str, Any]) -> Span:
    if event["name"] != str(action):
        raise ValueError(f"it has {event['name']} where the plan has {action}")
    start, duration = event["ts"], event["dur"]
    if not all(isinstance(time, int | float) and math.isfinite(time) for time in (start, duration)):
        raise ValueError(f"{action} has ts={start!r} and dur={duration!r}; both must be finite numbers of microseconds")
    if duration < 0:
        raise ValueError(f"{action} takes dur={duration!r} microseconds; it cannot take less than none")
    return Span(action, start / _MICROSECONDS, (start + duration) / _MICROSECONDS)


def trace_events(plan: Plan, timeline: Timeline) -> list[dict[str, Any]]:
    """The events of `write_trace`."""
    events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "pid": 0, "args": {"name": _title(plan)}}]
    for rank, spans in enumerate(timeline):
        events.append({"ph": "M", "name": "thread_name", "pid": 0, "tid": rank, "args": {"name": f"rank {rank}"}})
        held = 0
        for span in spans:
            start, end = float(span.start) * _MICROSECONDS, float(span.end) * _MICROSECONDS
            kinds = [operation.kind for operation in span.action.operations]
            events.append({
                "ph": "X", "name": str(span.action), "cat": "FB" if span.action.is_overlapped else str(kinds[0]),
                "pid": 0, "tid": rank, "ts": start, "dur": end - start,
                "args": {str(operation.kind): _described(plan, rank, operation)
                         for operation in span.action.operations}})
            for kind, time in ((Kind.FORWARD, start), (Kind.BACKWARD, end), (Kind.BACKWARD_WEIGHT, end)):
                if kind in kinds:
                    held += 1 if kind is Kind.FORWARD else -1
                    events.append({"ph": "C", "name": f"activations, rank {rank}", "pid": 0, "ts": time,
                                   "args": {"chunks": held}})
    return events


def _check(plan: Plan, timeline: Timeline) -> float:
    """The end of the timeline, if it can be drawn."""
    if len(timeline) != plan.num_ranks:
        raise ValueError(f"the timeline has {len(timeline)} ranks and the plan {plan.num_ranks}; draw a timeline with "
                         "its own plan")
    end = max((float(span.end) for spans in timeline for span in spans), default=0.0)
    for rank, spans in enumerate(timeline):
        for before, span in itertools.pairwise(spans):
            if float(span.start) < float(before.end) - _ROUNDING * abs(end):
                raise ValueError(f"rank {rank} begins {span.action} at {float(span.start):g} before it has ended "
                                 f"{before.action} at {float(before.end):g}; a rank does one action at a time")
    if end <= 0 or not any(span.end > span.start for spans in timeline for span in spans):
        raise ValueError("the timeline holds no action that takes time; there is nothing to draw")
    return end


def _title(plan: Plan) -> str:
    stages = f", {plan.num_stages} stages" if plan.num_stages != plan.num_ranks else ""
    name = f"{plan.schedule} with pairs" if plan.is_overlapped else plan.schedule
    return f"{name}: {plan.num_ranks} ranks{stages}, {plan.num_microbatches} micro-batches"


def _described(plan: Plan, rank: int, operation: Operation) -> str:
    direction, stage = plan.placement[rank][operation.chunk]
    return (f"stage {stage}, micro-batch {operation.microbatch}"
            + (f", direction {direction}" if plan.num_directions > 1 else ""))


def _color(operation: Operation, num_chunks: int) -> tuple[float, ...]:
    strong, light = ([int(color[i:i + 2], 16) / 255 for i in (1, 3, 5)] for color in _COLORS[operation.kind])
    share = operation.chunk / (num_chunks - 1) if num_chunks > 1 else 0.0
    return tuple(a + (b - a) * share for a, b in zip(strong, light, strict=True))


def _draw_blocks(axes: Any, plan: Plan, timeline: Timeline, inches_per_unit: float) -> None:
    from matplotlib.collections import PolyCollection

    blocks, colors, frames = [], [], []
    for rank, spans in enumerate(timeline):
        for span in spans:
            left, right = float(span.start), float(span.end)
            top, bottom = rank - 0.46, rank + 0.46
            edges = [top, rank, bottom] if span.action.is_overlapped else [top, bottom]
            for operation, upper, lower in zip(span.action.operations, edges, edges[1:], strict=False):
                color = _color(operation, plan.num_chunks)
                blocks.append([(left, upper), (right, upper), (right, lower), (left, lower)])
                colors.append(color)
                rows = (lower - upper) * _ROW_INCHES
                _write_number(axes, operation, (left + right) / 2, (upper + lower) / 2, color,
                              (right - left) * inches_per_unit, rows)
            if span.action.is_overlapped:
                frames.append([(left, top), (right, top), (right, bottom), (left, bottom)])
    axes.add_collection(PolyCollection(blocks, facecolors=colors, edgecolors="white", linewidths=0.6, zorder=2))
    axes.add_collection(PolyCollection(frames, facecolors="none", edgecolors=_INK, linewidths=0.9, zorder=3))


def _write_number(axes: Any, operation: Operation, x: float, y: float, color: tuple[float, ...], width: float,
                  height: float) -> None:
    """The micro-batch, as large as the block (sizes in inches) takes; nothing where it could not be read."""
    digits = str(operation.microbatch)
    size = min(9.0, height * _POINTS_PER_INCH * 0.72, width * _POINTS_PER_INCH * 0.92 / (_DIGIT * len(digits)))
    if size < 4:
        return
    brightness = 0.30 * color[0] + 0.59 * color[1] + 0.11 * color[2]
    axes.text(x, y, digits, ha="center", va="center_baseline", fontsize=size, zorder=4,
              color=_INK if brightness > 0.62 else "white", clip_on=True)


def _draw_frame(axes: Any, plan: Plan, timeline: Timeline, end: float) -> None:
    """Axes, and beside each row how long the rank waits and what it holds."""
    axes.set_xlim(0, end)
    axes.set_ylim(plan.num_ranks - 0.5, -0.5)
    axes.set_yticks(range(plan.num_ranks), [f"rank {rank}" for rank in range(plan.num_ranks)], fontsize=9, color=_INK)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8, colors=_MUTED)
    axes.set_facecolor("#f3f4f6")  # waiting
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    # columns beside the chart, in inches from its right edge
    columns = [("waits", 0.62, [f"{100 * (1 - sum(float(s.end - s.start) for s in spans) / end):.1f}%"
                                for spans in timeline]),
               ("activations", 1.42, [str(peak) for peak in peak_activations(plan)])]
    for heading, inches, values in columns:
        for y, text in [(-0.72, heading), *enumerate(values)]:
            axes.annotate(text, (1, y), xycoords=("axes fraction", "data"), xytext=(inches * _POINTS_PER_INCH, 0),
                          textcoords="offset points", ha="right", va="center", annotation_clip=False,
                          fontsize=8 if y < 0 else 9, color=_MUTED if y < 0 else _INK)


def _draw_legend(axes: Any, plan: Plan, timeline: Timeline, offset: float) -> None:
    from matplotlib.patches import Patch

    kinds = {operation.kind for spans in timeline for span in spans for operation in span.action.operations}
    chunks = range(plan.num_chunks) if plan.num_chunks <= 2 else (0, plan.num_chunks - 1)
    handles = [Patch(color=_color(Operation(kind, chunk, 0), plan.num_chunks),
                     label=_NAMES[kind] + (f", chunk {chunk}" if plan.num_chunks > 1 else ""))
               for kind in Kind if kind in kinds for chunk in chunks]
    if any(span.action.is_overlapped for spans in timeline for span in spans):
        handles.append(Patch(facecolor="white", edgecolor=_INK, label="overlapped pair"))
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(0, offset), ncols=5, frameon=False, fontsize=8,
                borderaxespad=0, handlelength=1.2, columnspacing=1.4, labelcolor=_INK)
