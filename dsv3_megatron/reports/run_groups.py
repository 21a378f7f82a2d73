"""Which runs differ by their seed alone: those of a sweep by its settings, others by what they were asked to be.

A sweep's folder has `sweep.json`, which names each run's setting, seed and folder. Other runs are compared by the
configuration that each wrote beside its logs.

Usage:
    groups = read_groups([Path("runs/learning-rate"), Path("runs/other/tensorboard")])
    groups[0].name, groups[0].column("lm_loss")
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.json_files import read_json_object
from dsv3_megatron.config.output import json_text
from dsv3_megatron.metrics.run_records import CONFIG_FILE, METRICS_FILE, RunRecords, read_records

SWEEP_FILE = "sweep.json"
# What runs may differ in besides the seed and still be of one setting: where they write.
_PLACES = ("checkpoint", "logging")
_MOST_NAMED = 3

# (step, mean, least, most) over the runs of a group.
Band = list[tuple[int, float, float, float]]


@dataclass(frozen=True)
class SeededRun:
    """Measurements of one run of a group.

    Attributes:
        seed: Seed of the run; None: not known.
        folder: Folder of its logs.
        records: Content of its metrics.jsonl.
    """

    seed: int | None
    folder: Path
    records: RunRecords

    def column(self, name: str, *, is_validation: bool = False) -> list[tuple[int, float]]:
        """(step, value) of each step, or of each validation, that has a value of this name."""
        return self.records.validation_column(name) if is_validation else self.records.column(name)


@dataclass(frozen=True)
class RunGroup:
    """Runs that differ by their seed alone.

    Attributes:
        name: Setting of the runs, for people.
        runs: The runs.
    """

    name: str
    runs: tuple[SeededRun, ...]


def band_of(curves: Sequence[Sequence[tuple[int, float]]]) -> Band:
    """Mean, least and most of several curves at each step at which all of them have a value."""
    by_step = [dict(curve) for curve in curves]
    steps = sorted(set.intersection(*(set(curve) for curve in by_step))) if by_step else []
    rows = ((step, [curve[step] for curve in by_step]) for step in steps)
    return [(step, statistics.fmean(values), min(values), max(values)) for step, values in rows]


def read_groups(folders: Sequence[Path]) -> tuple[list[RunGroup], list[str]]:
    """Read runs and sweeps, also while they are under way.

    Args:
        folders: Each a sweep's folder, a run's folder of logs, or the folder above that.

    Returns:
        The groups in the order in which they were named; and what is to be said of runs without a step, which are left
        out.

    Raises:
        ValueError: a folder is none of these, is named twice, or has a file that cannot be read.
    """
    found: dict[str, list[SeededRun]] = {}
    alone: list[tuple[SeededRun, dict[str, Any]]] = []
    remarks: list[str] = []
    seen: set[Path] = set()
    sweeps = [folder for folder in folders if (folder / SWEEP_FILE).is_file()]
    for folder in folders:
        if folder in sweeps:
            whose = f"{folder.resolve().name}: " if len(sweeps) > 1 else ""
            for name, seed, logs in runs_of_sweep(folder):
                run = _read(logs, seed, seen, remarks)
                if run is not None:
                    found.setdefault(whose + name, []).append(run)
            continue
        logs = _logs(folder)
        config = _config(logs)
        run = _read(logs, config.get("training", {}).get("seed"), seen, remarks)
        if run is not None:
            alone.append((run, config))
    groups = [RunGroup(name, tuple(runs)) for name, runs in found.items()]
    return groups + _grouped(alone, taken=set(found)), remarks


def runs_of_sweep(folder: Path) -> list[tuple[str, int, Path]]:
    """Setting, seed and folder of logs of each run of a sweep.

    Raises:
        ConfigError: the sweep's file cannot be read.
    """
    path = folder / SWEEP_FILE
    try:
        return [(str(run["setting"]), int(run["seed"]), folder / run["folder"] / "tensorboard")
                for run in read_json_object(path)["runs"]]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ConfigError(f"{path} is not a sweep's ({error!r}); dsv3 sweep writes it anew when it is started again"
                          ) from error


# -- parts ---------------------------------------------------------------------------------------------


def _logs(folder: Path) -> Path:
    for logs in (folder, folder / "tensorboard", folder / "logs"):
        if (logs / METRICS_FILE).is_file():
            return logs
    raise ConfigError(f"{folder} has neither {METRICS_FILE} nor {SWEEP_FILE}: give the folder that a run had as "
                      "--tensorboard-dir, or that of a sweep")


def _config(logs: Path) -> dict[str, Any]:
    path = logs / CONFIG_FILE
    try:
        return read_json_object(path)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON of a run: {error}") from error


def _read(logs: Path, seed: int | None, seen: set[Path], remarks: list[str]) -> SeededRun | None:
    place = logs.resolve()
    if place in seen:
        raise ConfigError(f"{logs} is named twice; a run counts once")
    seen.add(place)
    path = logs / METRICS_FILE
    records = read_records(path) if path.is_file() else RunRecords([], [])
    if not records.steps:
        remarks.append(f"{logs} has no step yet: drawn without it")
        return None
    return SeededRun(seed, logs, records)


def _grouped(alone: Sequence[tuple[SeededRun, dict[str, Any]]], taken: set[str]) -> list[RunGroup]:
    """Groups of runs that are of no sweep; each named by what it differs in from the others, or by its folder."""
    by_setting: dict[str, list[SeededRun]] = {}
    fields: dict[str, dict[str, Any]] = {}
    for run, config in alone:
        flat = _fields(config) or {"folder": str(run.folder)}  # nothing is known of it: it is alone
        key = json_text(flat, sort_keys=True)
        by_setting.setdefault(key, []).append(run)
        fields[key] = flat
    varied = [name for name in dict.fromkeys(name for flat in fields.values() for name in flat)
              if len({json_text(flat.get(name)) for flat in fields.values()}) > 1]
    groups = []
    for key, runs in by_setting.items():
        name = ", ".join(f"{field.rpartition('.')[2]}={_shown(fields[key].get(field))}" for field in varied)
        if not 0 < len(varied) <= _MOST_NAMED or name in taken:
            name = _folder_name(runs[0].folder)
        while name in taken:
            name += "'"
        taken.add(name)
        groups.append(RunGroup(name, tuple(runs)))
    return groups


def _fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every field of a configuration as section.field, but for the seed and the places."""
    flat: dict[str, Any] = {}
    for section, values in config.items():
        if section in _PLACES:
            continue
        for name, value in values.items() if isinstance(values, dict) else [("", values)]:
            flat[f"{section}.{name}".rstrip(".")] = value
    flat.pop("training.seed", None)
    return flat


def _folder_name(logs: Path) -> str:
    logs = logs.resolve()
    return logs.parent.name if logs.name in ("tensorboard", "logs") else logs.name


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
