"""The results of a sweep: what each run came to, and mean and spread of each setting over its seeds.

    last   training: mean of the last steps; validation: the last one
    best   training: the best mean of as many steps in a row; validation: the best one

The best of a loss is its lowest, of a reward its highest. Usage:
    results = [RunResult.of(run.setting, run.seed, state, folder, measures=("lm_loss",)) for run in runs]
    print(as_text(results, measures=("lm_loss",)))
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3_megatron.config.output import finite
from dsv3_megatron.metrics.run_records import METRICS_FILE, RunRecords, read_records

# Steps that a training value is the mean of: fewer in a run that has fewer than four times as many.
_WINDOW = 10
DONE = "done"
LOSS, REWARD = "lm_loss", "grpo/reward"


@dataclass(frozen=True)
class RunResult:
    """What one run came to.

    Attributes:
        setting: Name of its setting.
        seed: Seed of the run.
        state: State of the run, for people; DONE: finished.
        folder: Folder of the run.
        num_steps: Optimizer steps that it has taken.
        values: Values by name, as "lm_loss, last" and "validation lm_loss, best".
    """

    setting: str
    seed: int
    state: str
    folder: Path
    num_steps: int
    values: Mapping[str, float]

    @classmethod
    def of(cls, setting: str, seed: int, state: str, folder: Path, *, measures: Sequence[str]) -> RunResult:
        """Read a run's results from its logs, which may be missing.

        Args:
            setting: Name of its setting.
            seed: Seed of the run.
            state: State of the run.
            folder: Folder of the run, whose logs are in its folder `tensorboard`.
            measures: Columns of metrics.jsonl.

        Raises:
            ConfigError: the logs are damaged.
        """
        file = folder / "tensorboard" / METRICS_FILE
        records = read_records(file) if file.is_file() else RunRecords([], [])
        values: dict[str, float] = {}
        for measure in measures:
            values |= _values(measure, [value for _, value in records.column(measure)],
                              [value for _, value in records.validation_column(measure)])
        return cls(setting, seed, state, folder, records.steps[-1]["iteration"] if records.steps else 0, values)


@dataclass(frozen=True)
class Spread:
    """A value over the runs of a setting.

    Attributes:
        mean: Mean over the runs.
        deviation: Standard deviation of a run (n - 1); None: there is one run.
        least: Least value.
        most: Most value.
        num_runs: Number of runs.
    """

    mean: float
    deviation: float | None
    least: float
    most: float
    num_runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, min(values),
                   max(values), len(values))

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + ("" if self.deviation is None else f" ± {self.deviation:.4f}")


def measures_of(command: str, given: Sequence[str]) -> tuple[str, ...]:
    """The columns that a sweep's table has: those of its file, or the loss, or of GRPO the reward."""
    return tuple(given) or ((REWARD,) if command == "grpo" else (LOSS,))


def spreads(results: Sequence[RunResult]) -> dict[str, dict[str, Spread]]:
    """Spread of each value over the finished runs, by the setting and by the value's name."""
    table: dict[str, dict[str, Spread]] = {}
    for setting in dict.fromkeys(result.setting for result in results):
        done = [result for result in results if result.setting == setting and result.state == DONE]
        names = dict.fromkeys(name for result in done for name in result.values)
        table[setting] = {name: Spread.of([result.values[name] for result in done if name in result.values])
                          for name in names}
    return table


def differences(results: Sequence[RunResult], base: str, name: str) -> dict[str, Spread]:
    """A value less that of the base's run with the same seed, over the finished runs, by the setting."""
    done = [result for result in results if result.state == DONE and name in result.values]
    reference = {result.seed: result.values[name] for result in done if result.setting == base}
    found: dict[str, Spread] = {}
    for setting in dict.fromkeys(result.setting for result in done if result.setting != base):
        gaps = [result.values[name] - reference[result.seed] for result in done
                if result.setting == setting and result.seed in reference]
        if gaps:
            found[setting] = Spread.of(gaps)
    return found


def as_text(results: Sequence[RunResult], *, base: str | None = None) -> str:
    """The table in Markdown: a line for each setting, mean ± standard deviation over its seeds; then what is not done.
    """
    table = spreads(results)
    names = list(dict.fromkeys(name for row in table.values() for name in row))
    gaps = {name: differences(results, base, name) for name in _compared(names)} if base else {}
    lines = ["| setting | runs | " + " | ".join([*names, *(f"{name}, less {base}'s" for name in gaps)]) + " |",
             "| --- | ---: |" + " ---: |" * (len(names) + len(gaps))]
    for setting, row in table.items():
        mine = [result for result in results if result.setting == setting]
        cells = [str(row[name]) if name in row else "" for name in names]
        cells += [_signed(gap[setting]) if setting in gap else "" for gap in gaps.values()]
        num_done = sum(result.state == DONE for result in mine)
        lines.append(f"| {setting} | {num_done} of {len(mine)} | " + " | ".join(cells) + " |")
    left = [f"{result.setting}, seed {result.seed}: {result.state}, {result.num_steps} steps ({result.folder})"
            for result in results if result.state != DONE]
    return "\n".join([*lines, *([""] if left else []), *left])


def as_csv(results: Sequence[RunResult], settings: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each run: setting, what makes the setting, seed, state, steps, values, folder.

    Args:
        results: The runs.
        settings: What each setting gives, by its name.
    """
    given = list(dict.fromkeys(key for values in settings.values() for key in values))
    names = list(dict.fromkeys(name for result in results for name in result.values))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("setting", *given, "seed", "state", "steps", *names, "folder"))
    for result in results:
        values = settings.get(result.setting, {})
        writer.writerow((
            result.setting, *(_cell(values.get(key, "")) for key in given), result.seed, result.state, result.num_steps,
            *(f"{result.values[name]:.6g}" if name in result.values else "" for name in names), result.folder))
    return text.getvalue()


def as_json(results: Sequence[RunResult], settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The results of a sweep as plain values: `settings` with the spread of each value, and `runs`."""
    table = spreads(results)
    return finite({
        "settings": [{"name": name, "values": dict(values), "results": {
            key: vars(spread) for key, spread in table.get(name, {}).items()}} for name, values in settings.items()],
        "runs": [{"setting": result.setting, "seed": result.seed, "state": result.state, "steps": result.num_steps,
                  "results": dict(result.values), "folder": str(result.folder)} for result in results]})


# -- parts ---------------------------------------------------------------------------------------------


def _values(measure: str, steps: Sequence[float], validations: Sequence[float]) -> dict[str, float]:
    best = max if measure.startswith(REWARD) else min
    found: dict[str, float] = {}
    if steps:
        window = max(1, min(_WINDOW, len(steps) // 4))
        means = [statistics.fmean(steps[end - window:end]) for end in range(window, len(steps) + 1)]
        found |= {f"{measure}, last": means[-1], f"{measure}, best": best(means)}
    if validations:
        found |= {f"validation {measure}, last": validations[-1], f"validation {measure}, best": best(validations)}
    return found


def _compared(names: Sequence[str]) -> list[str]:
    """The values that a setting is compared by: the last ones; of validations alone, where there are any."""
    last = [name for name in names if name.endswith(", last")]
    return [name for name in last if name.startswith("validation ")] or last


def _signed(spread: Spread) -> str:
    return f"{spread.mean:+.4f}" + ("" if spread.deviation is None else f" ± {spread.deviation:.4f}")


def _cell(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
