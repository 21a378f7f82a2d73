"""Draw what pipeline ranks did when, from a file of a run's --trace-schedule (or of dsv3 simulate --trace).

    dsv3 draw-schedule trace.json --png schedule.png

prints the time of the step and how long each rank waited in it, and writes a Gantt chart.
"""

from __future__ import annotations

import argparse

from dsv3_megatron.config.output import require_output_file
from dsv3_megatron.config.streams import print_error
from dsv3_megatron.schedule.draw import plot_timeline, read_trace


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="dsv3 draw-schedule", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", metavar="TRACE", help="file of --trace-schedule")
    parser.add_argument("--png", metavar="FILE", help="where to draw")
    options = parser.parse_args(arguments)
    try:
        require_output_file("--png", options.png, ending=".png")
        plan, timeline = read_trace(options.trace)
        end = max(float(spans[-1].end) for spans in timeline)
        print(f"{plan.schedule}: {plan.num_ranks} ranks, {plan.num_stages} stages, {plan.num_microbatches} "
              f"micro-batches, step {end:.1f} ms")
        for rank, spans in enumerate(timeline):
            busy = sum(float(span.end - span.start) for span in spans)
            print(f"rank {rank} waited {end - busy:.1f} ms, {100 * (1 - busy / end):.1f}%")
        if options.png:
            plot_timeline(plan, timeline, options.png)
    except (ValueError, OSError) as error:
        print_error(error)
        return 2
    return 0
