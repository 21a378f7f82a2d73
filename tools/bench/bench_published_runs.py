"""Published speeds of DeepSeek-V3's training, by machine, beside what the planner predicts for them.

    python -m tools.bench.bench_published_runs [--no-csv]
    python -m tools.bench.update_readme

Nothing is measured here, and nothing was fitted. Rows go to tools/bench/results/published_runs.csv, with the address of
each published number; the table of docs/planning/README.md is made from them.
"""

from __future__ import annotations

import argparse

from dsv3_megatron.papers.published_runs import PUBLISHED_RUNS, RunPrediction, predict
from tools.bench.records import Measurement, append_rows

FILE = "published_runs.csv"
METRIC = "tokens_per_second_per_gpu"


def config_of(prediction: RunPrediction) -> str:
    """What a row is of: run, machine, layout, what is not modelled, address."""
    run = prediction.published
    return "; ".join((run.name, f"{run.num_gpus} x {run.hardware}", run.layout(), run.other or "-", run.address))


def measurements(prediction: RunPrediction) -> list[Measurement]:
    """The rows of a run: published, and predicted where it can be."""
    config = config_of(prediction)
    rows = [Measurement("published", config, METRIC, prediction.published.tokens_per_second, "1/s")]
    if prediction.tokens_per_second is not None:
        rows.append(Measurement("predicted", config, METRIC, prediction.tokens_per_second, "1/s"))
    return rows


def main() -> None:
    """Predict every run, print the distances, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-csv", action="store_true", help="print only")
    options = parser.parse_args()
    predictions = [predict(run) for run in PUBLISHED_RUNS]
    for prediction in predictions:
        run, distance = prediction.published, prediction.distance
        told = "not predicted" if distance is None else f"{prediction.tokens_per_second:8,.0f} {distance:+7.1%}"
        machine = f"{run.num_gpus} x {run.hardware}"
        print(f"{run.name:28} {machine:14} {run.layout():44} {run.tokens_per_second:8,.0f} {told}")
    if not options.no_csv:
        append_rows(FILE, [row for prediction in predictions for row in measurements(prediction)], "predicted")


if __name__ == "__main__":
    main()
