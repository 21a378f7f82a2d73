"""Draw a run on one page, or several runs in one picture with bands over their seeds.

    dsv3 plot runs/quickstart/tensorboard --output run.png
    dsv3 plot runs/study --csv curves.csv
    dsv3 plot runs/one/tensorboard runs/other/tensorboard --output both.png

The page of one run has losses, recipe, gradients, speed, memory, balance and time per phase. A sweep's folder, or
several runs, become one picture: a curve for each setting, the mean of the runs that differ by their seed alone, and
their range as a band.

Reads TensorBoard's event files of one run, and metrics.jsonl and config.json. Works while runs are under way. Exit
status: 0 drawn, 2 a folder cannot be read or has nothing to draw.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.output import require_output_file
from dsv3_megatron.config.streams import print_error
from dsv3_megatron.metrics.event_files import read_run
from dsv3_megatron.metrics.run_records import CONFIG_FILE, METRICS_FILE
from dsv3_megatron.reports.groups_plot import draw_groups, write_curves
from dsv3_megatron.reports.report_page import draw_report
from dsv3_megatron.reports.run_groups import SWEEP_FILE, read_groups


def _parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="dsv3 plot", description=__doc__.partition("\n\n")[0],
                                     epilog=__doc__.partition("\n\n")[2],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="folder that a run had as "
                        "--tensorboard-dir, or that of a sweep")
    parser.add_argument("--output", type=Path, metavar="FILE.png", help="picture to write; none: report.png in the "
                        "folder of one run, curves.png in that of a sweep")
    parser.add_argument("--csv", type=Path, metavar="FILE.csv", help="of a sweep or several runs: write their curves "
                        "too")
    parser.add_argument("--title", default="", metavar="TEXT", help="heading of the picture of several runs")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = _parse_arguments(arguments)
    try:
        require_output_file("--output", options.output, ending=".png")
        require_output_file("--csv", options.csv, ending=".csv")
        first, *others = options.folders
        is_sweep = (first / SWEEP_FILE).is_file()
        if others or is_sweep:
            if options.output is None and others:
                raise ConfigError("--output is not set: name the picture of several folders, as in --output both.png")
            print(_draw_several(options.folders, options.output or first / "curves.png", options.csv, options.title))
        elif options.csv is not None or options.title:
            raise ConfigError("--csv and --title are for a sweep or several runs; leave them out")
        else:
            print(_draw_one(first, options.output or first / "report.png"))
    except (ValueError, OSError) as error:
        print_error(error)
        return 2
    return 0


def _draw_one(logs: Path, output: Path) -> Path:
    log = read_run(logs)
    for path in log.cut_short:
        print(f"{path}: the last record is cut short, as of a run under way or killed; drawn without it",
              file=sys.stderr)
    if log.records is None and log.config is not None:
        print(f"{logs / METRICS_FILE} is missing, which a run writes beside {CONFIG_FILE}: drawn without it",
              file=sys.stderr)
    draw_report(log, output)
    return output


def _draw_several(folders: list[Path], output: Path, table: Path | None, title: str) -> Path:
    groups, remarks = read_groups(folders)
    for remark in remarks:
        print(remark, file=sys.stderr)
    draw_groups(groups, output, title=title or ", ".join(dict.fromkeys(_name(folder) for folder in folders[:3])))
    if table is not None:
        write_curves(groups, table)
    return output


def _name(folder: Path) -> str:
    folder = folder.resolve()
    return folder.parent.name if folder.name in ("tensorboard", "logs") else folder.name
