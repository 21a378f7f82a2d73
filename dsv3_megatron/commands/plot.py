"""Draw a run on one page: losses, recipe, gradients, speed, memory, balance, time per phase.

    dsv3 plot runs/quickstart/tensorboard --output run.png

Reads TensorBoard's event files, and metrics.jsonl and config.json beside them where they are. Works while the run is
under way. Exit status: 0 drawn, 2 the folder cannot be read or has nothing to draw.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dsv3_megatron.config.output import require_output_file
from dsv3_megatron.config.streams import print_error
from dsv3_megatron.metrics.event_files import read_run
from dsv3_megatron.metrics.run_records import CONFIG_FILE, METRICS_FILE
from dsv3_megatron.reports.report_page import draw_report


def _parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="dsv3 plot", description="Draw a run on one page.")
    parser.add_argument("logdir", type=Path, help="folder that the run had as --tensorboard-dir")
    parser.add_argument("--output", type=Path, metavar="FILE.png", help="picture to write; none: LOGDIR/report.png")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = _parse_arguments(arguments)
    output = options.output or options.logdir / "report.png"
    try:
        if options.output is not None:
            require_output_file("--output", output, ending=".png")
        log = read_run(options.logdir)
        for path in log.cut_short:
            print(f"{path}: the last record is cut short, as of a run under way or killed; drawn without it",
                  file=sys.stderr)
        if log.records is None and log.config is not None:
            print(f"{options.logdir / METRICS_FILE} is missing, which a run writes beside {CONFIG_FILE}: drawn without "
                  "it", file=sys.stderr)
        draw_report(log, output)
    except (ValueError, OSError) as error:
        print_error(error)
        return 2
    print(output)
    return 0
