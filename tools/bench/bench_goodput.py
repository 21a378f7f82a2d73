"""Published runs with failures beside what the planner makes of them, by its formula and by drawn events.

    python -m tools.bench.bench_goodput [--no-csv]
    python -m tools.bench.update_readme

Nothing is measured here, and nothing was fitted. Rows go to tools/bench/results/goodput.csv; the table of
docs/planning/README.md is made from them.
"""

from __future__ import annotations

import argparse

from dsv3_megatron.papers.published_failures import PUBLISHED_FAILURES, PublishedFailures
from dsv3_megatron.planning.goodput.failure_events import draw_run
from tools.bench.records import Measurement, append_rows

FILE = "goodput.csv"
# Failures of the drawn run: their share is then known to about a tenth of a percent.
_NUM_FAILURES = 4000


def config_of(run: PublishedFailures) -> str:
    """What a row is of: run, GPUs, what was taken for what is not published, address."""
    other = "; ".join(filter(None, (run.taken, run.note))).replace("; ", ", ")
    return "; ".join((run.name, f"{run.failures.num_gpus}", other, run.address))


def drawn_share(run: PublishedFailures, seed: int = 0) -> float:
    """Share of time that counts in one long run drawn event by event."""
    work = run.failures.seconds_between * _NUM_FAILURES
    return work / draw_run(run.failures, run.interval, work, seed).seconds


def measurements(run: PublishedFailures) -> list[Measurement]:
    """The rows of a run."""
    config, name = config_of(run), "above" if run.is_lower_bound else "published"
    return [Measurement(name, config, "effective_training_time", run.published, ""),
            Measurement("predicted", config, "effective_training_time", run.predicted, ""),
            Measurement("drawn", config, "effective_training_time", drawn_share(run), ""),
            Measurement("predicted", config, "interval", run.interval, "s"),
            Measurement("predicted", config, "restart", run.failures.restart_seconds, "s"),
            Measurement("predicted", config, "explaining_restart", run.explaining_restart_seconds, "s")]


def main() -> None:
    """Print the shares of every run, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-csv", action="store_true", help="print only")
    options = parser.parse_args()
    rows = [row for run in PUBLISHED_FAILURES for row in measurements(run)]
    for row in rows:
        print(f"{row.config.partition(';')[0]:48} {row.metric:24} {row.name:10} {row.value:.4g} {row.unit}")
    if not options.no_csv:
        append_rows(FILE, rows, "predicted")


if __name__ == "__main__":
    main()
