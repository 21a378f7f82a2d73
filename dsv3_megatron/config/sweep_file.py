"""Reads the file of a sweep: settings x seeds of one command that trains. No torch.

    command = "train"                       # or sft, grpo
    output = "runs/learning-rate"           # a folder below it for each run
    seeds = [1, 2, 3]

    [settings]                              # flags of every run
    preset = "tiny"
    data_path = "data/train_text_document"

    [grid]                                  # every combination of these
    lr = [3e-3, 6e-3]

    [variants."without a bias"]             # or settings with names, of which the grid is done with each
    moe_router_bias_update_rate = 0

A setting is spelled as its flag or its field, with - or _. `{run}` in a text is the folder of the run.
"""

from __future__ import annotations

import argparse
import difflib
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.files import parse_file
from dsv3_megatron.config.load import CommandLine, TrainingRequest, build_parser
from dsv3_megatron.config.megatron_flags import BY_NAME

COMMANDS_OF_SWEEPS = ("train", "sft", "grpo")
PLACE_OF_RUN = "{run}"
# A run's own, which the sweep gives it.
_GIVEN_BY_THE_SWEEP = ("seed", "save", "tensorboard_dir", "resume", "overwrite_run")
# With these a command prints something, or checks, and trains nothing.
_WITHOUT_TRAINING = ("print_model", "print_schedule", "plot_schedule", "json", "check_only", "world_size", "hardware",
                     "help")
# Files and folders that one run alone can write.
_OF_ONE_RUN = ("export_hf", "trace_schedule", "prometheus_file", "rollouts")
_TABLES = ("settings", "grid", "variants")
_MOST_SEED, _LONGEST_NAME = 2**32 - 1, 150


@dataclass(frozen=True)
class SweepSetting:
    """One setting of a sweep.

    Attributes:
        name: Name in tables and pictures: the variant's, and what the grid gives.
        values: What the variant and the grid give, by the names of fields or flags.
        words: Words of the command line of every run with this setting, but for what is a run's own.
    """

    name: str
    values: Mapping[str, Any]
    words: tuple[str, ...]

    @property
    def folder(self) -> str:
        """Name of the setting's folder: its name, without what a shell or a file system minds."""
        return re.sub(r"[^\w.=+-]+", "_", self.name, flags=re.ASCII).strip("_.") or "setting"


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep.

    Attributes:
        setting: Name of its setting.
        seed: Seed of weights and data order.
        folder: Folder of its logs and checkpoints.
        own_words: Words of its setting and its seed: runs with the same ones compute the same.
    """

    setting: str
    seed: int
    folder: Path
    own_words: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of the run for people."""
        return f"{self.setting}, seed {self.seed}"

    @property
    def logs(self) -> Path:
        """Folder for its measurements."""
        return self.folder / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """Folder for its checkpoints."""
        return self.folder / "checkpoints"

    @property
    def words(self) -> tuple[str, ...]:
        """All words of its command line; a run that was broken off goes on from its newest checkpoint."""
        own = (word.replace(PLACE_OF_RUN, str(self.folder)) for word in self.own_words)
        return (*own, "--save", str(self.checkpoints), "--tensorboard-dir", str(self.logs), "--resume", "auto")


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep's file asks for.

    Attributes:
        command: Command that trains: "train", "sft" or "grpo".
        output: Folder of the sweep.
        seeds: Seeds of every setting.
        settings: The settings, in the order of the file.
        processes: Processes of each run.
        at_a_time: Runs that are under way together.
        measures: Columns of metrics.jsonl that the table has; empty: the losses, or the reward.
        base: Name of the setting that the others are compared with, seed by seed; None: none.
        keeps_checkpoints: Whether checkpoints of finished runs stay.
    """

    command: str
    output: Path
    seeds: tuple[int, ...]
    settings: tuple[SweepSetting, ...] = field(repr=False)
    processes: int = 1
    at_a_time: int = 1
    measures: tuple[str, ...] = ()
    base: str | None = None
    keeps_checkpoints: bool = True

    @property
    def runs(self) -> tuple[SweepRun, ...]:
        """Every run, seed by seed, so that each setting has a result early."""
        return tuple(SweepRun(setting.name, seed, self.output / setting.folder / f"seed-{seed}",
                              (*setting.words, "--seed", str(seed)))
                     for seed in self.seeds for setting in self.settings)


def read_sweep(path: str, line_of: Callable[[str], CommandLine]) -> SweepPlan:
    """Read the file of a sweep; nothing is looked at but the file.

    Args:
        path: The file: TOML, or the same as YAML or JSON.
        line_of: Gives the command line of a command by its name.

    Raises:
        ConfigError: the file cannot be read, names a flag that there is not, or two of its runs would be the same or
            would write into one folder. All unknown flags are named at once.
    """
    try:
        content = parse_file(path)
    except ConfigError as error:
        raise ConfigError(str(error).removeprefix("config=")) from error
    try:
        return _plan(content, line_of)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def check_settings(plan: SweepPlan, parse: Callable[[Sequence[str]], TrainingRequest]) -> dict[str, int]:
    """Read the command line of every setting as its runs will, and check the run that it asks for.

    Args:
        plan: The sweep.
        parse: Reader of the command's words.

    Returns:
        Optimizer steps of a run, by the name of its setting.

    Raises:
        ValueError: a run cannot be; the message names the setting.
    """
    steps = {}
    for run in plan.runs[: len(plan.settings)]:
        try:
            request = parse(run.words)
            request.run.validate(plan.processes)
            steps[run.setting] = request.run.recipe().num_steps
        except ValueError as error:
            raise ConfigError(f"setting {run.setting!r}: {error}") from error
    return steps


# -- the file ------------------------------------------------------------------------------------------


def _plan(content: Mapping[Any, Any], line_of: Callable[[str], CommandLine]) -> SweepPlan:
    known = ("command", "output", "seeds", "processes", "at_a_time", "measures", "base", "keep_checkpoints", *_TABLES)
    for key in content:
        if key not in known:
            raise ConfigError(f"{key} is not a part of a sweep; the settings of its runs belong into [settings], and "
                              f"beside it there are {', '.join(known)}")
    command = content.get("command", "train")
    if command not in COMMANDS_OF_SWEEPS:
        raise ConfigError(f"command={command!r} must be one of {', '.join(COMMANDS_OF_SWEEPS)}")
    settings = _settings(content, _Flags(line_of(command)))
    base = content.get("base")
    if base is not None and base not in {setting.name for setting in settings}:
        raise ConfigError(f"base={base!r} is not a setting of this sweep; they are "
                          f"{', '.join(repr(setting.name) for setting in settings)}")
    plan = SweepPlan(
        command=command, output=_output(content.get("output")), seeds=_seeds(content.get("seeds")), settings=settings,
        processes=_count(content, "processes"), at_a_time=_count(content, "at_a_time"),
        measures=tuple(_texts(content.get("measures", []), "measures")), base=base,
        keeps_checkpoints=_truth(content, "keep_checkpoints"))
    _refuse_shared_places(plan)
    return plan


def _output(value: Any) -> Path:
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise ConfigError(f"output={value!r} must name the folder of the sweep, as in output = \"runs/my-sweep\"")
    return Path(value)


def _seeds(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not value:
        raise ConfigError(f"seeds={value!r} must be a list of whole numbers, as in seeds = [1, 2, 3]")
    for seed in value:
        if type(seed) is not int or not 0 <= seed <= _MOST_SEED:
            raise ConfigError(f"seeds has {seed!r}: a seed is a whole number from 0 to {_MOST_SEED}")
    twice = [seed for seed in value if value.count(seed) > 1]
    if twice:
        raise ConfigError(f"seeds has {twice[0]} twice: both would be the same run, in one folder; leave one out")
    return tuple(value)


def _count(content: Mapping[Any, Any], name: str) -> int:
    value = content.get(name, 1)
    if type(value) is not int or not 1 <= value <= 4096:
        raise ConfigError(f"{name}={value!r} must be a whole number from 1 to 4096")
    return value


def _truth(content: Mapping[Any, Any], name: str) -> bool:
    value = content.get(name, True)
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r} must be true or false")
    return value


def _texts(value: Any, name: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(text, str) and text for text in value):
        raise ConfigError(f"{name}={value!r} must be a list of texts")
    return value


def _settings(content: Mapping[Any, Any], flags: _Flags) -> tuple[SweepSetting, ...]:
    common = flags.given(_table(content, "settings"), "settings")
    grid = flags.given(_table(content, "grid"), "grid")
    variants = {str(name): flags.given(_table(variants, name, f"variants.{name}"), f"variants.{name}")
                for variants in [_table(content, "variants")] for name in variants}
    flags.refuse_unknown()
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"grid.{name}={values!r} must be a list of the values to try")
        for place in ("settings", *(f"variants.{variant}" for variant in variants)):
            if name in (common if place == "settings" else variants[place.removeprefix("variants.")]):
                raise ConfigError(f"{name} is given twice, in [grid] and in [{place}]; leave one out")
    found = []
    for (variant, own), point in itertools.product((variants or {"": {}}).items(), _points(grid)):
        values = own | point
        name = ", ".join([variant] * bool(variant) + [f"{key}={_shown(value)}" for key, value in point.items()])
        words = [word for key, value in (common | values).items() for word in flags.words(key, value)]
        found.append(SweepSetting(name or "base", values, tuple(words)))
    _refuse_repeats(found)
    return tuple(found)


def _table(content: Mapping[Any, Any], name: Any, shown: str = "") -> Mapping[Any, Any]:
    value = content.get(name, {})
    if not isinstance(value, Mapping):
        raise ConfigError(f"{shown or name} must be a table, as in [{shown or name}], not {value!r}")
    return value


def _points(grid: Mapping[str, list[Any]]) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def _shown(value: Any) -> str:
    """A value in the name of a setting; of a path its last part."""
    if isinstance(value, list):
        return "+".join(map(_shown, value))
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return Path(value).name if isinstance(value, str) and "/" in value else str(value)


class _Flags:
    """The flags of a command, and what becomes of the settings in a file."""

    def __init__(self, line: CommandLine) -> None:
        parser = build_parser(line)
        self._actions: dict[str, argparse.Action] = dict(parser._option_string_actions)
        # A field whose flag has another name may be written by its own.
        self._of_field = {action.dest: action.option_strings[0] for action in parser._actions if action.option_strings}
        self._unknown: dict[str, str] = {}

    def given(self, table: Mapping[Any, Any], place: str) -> dict[str, Any]:
        """What a table gives, by the names of the flags' fields.

        Raises:
            ConfigError: a setting is the sweep's own, makes a command print and stop, or is given twice.
        """
        found: dict[str, Any] = {}
        for key, value in table.items():
            name = str(key).removeprefix("--").replace("-", "_")
            if name in _GIVEN_BY_THE_SWEEP:
                raise ConfigError(f"{key}, in [{place}], is given by the sweep to each of its runs; leave it out"
                                  + (", and name seeds = [...] at the top" if name == "seed" else ""))
            if name in _WITHOUT_TRAINING:
                raise ConfigError(f"{key}, in [{place}], makes a command print or check something and stop; leave it "
                                  "out")
            if name in found:
                raise ConfigError(f"{key}, in [{place}], is given twice, with - and with _; leave one out")
            if self._flag(name) not in self._actions and self._flag(name) not in BY_NAME:
                self._unknown[f"{key}, in [{place}]"] = self._flag(name)
            found[name] = value
        return found

    def refuse_unknown(self) -> None:
        """Raise a ConfigError that names every setting so far that is none, with what it may have meant."""
        if not self._unknown:
            return
        flags = [*self._actions, *BY_NAME]
        told = []
        for place, flag in self._unknown.items():
            close = [near.removeprefix("--") for near in difflib.get_close_matches(flag, flags, n=2)]
            told.append(place + (f" (did you mean {' or '.join(close)}?)" if close else ""))
        raise ConfigError(f"no flag of the command: {'; '.join(told)}")

    def words(self, name: str, value: Any) -> list[str]:
        """A setting as words of the command line.

        Raises:
            ConfigError: the value is a table, or a list in a list.
        """
        flag = self._flag(name)
        action = self._actions.get(flag)
        if isinstance(value, bool) and isinstance(action, argparse.BooleanOptionalAction):
            return [flag if value else f"--no-{flag[2:]}"]
        if isinstance(value, bool) and (action is None or action.nargs == 0):  # a flag without a value
            return [flag] * value
        values = value if isinstance(value, list) else [value]
        for part in values:
            if not isinstance(part, str | int | float):
                raise ConfigError(f"{name}={part!r} must be a text, a number, true, false or a list of such; what a "
                                  "flag reads from a file stays in a file of its own")
        texts = [str(part).lower() if isinstance(part, bool) else str(part) for part in values]
        if len(texts) == 1 and texts[0].startswith("-"):
            return [f"{flag}={texts[0]}"]
        return [flag, *texts]

    def _flag(self, name: str) -> str:
        written = "--" + name.replace("_", "-")
        return written if written in self._actions else self._of_field.get(name, written)


def _refuse_repeats(settings: Sequence[SweepSetting]) -> None:
    by_folder: dict[str, SweepSetting] = {}
    by_words: dict[tuple[str, ...], SweepSetting] = {}
    for setting in settings:
        if len(setting.folder) > _LONGEST_NAME:
            raise ConfigError(f"the setting {setting.name[:60]!r}... has a name of {len(setting.folder)} characters, "
                              f"and its folder at most {_LONGEST_NAME}; give it a short one, as in [variants.NAME]")
        other = by_folder.setdefault(setting.folder, setting)
        if other is not setting:
            raise ConfigError(f"the settings {other.name!r} and {setting.name!r} would share the folder "
                              f"{setting.folder}; name them apart, as in [variants.NAME]")
        other = by_words.setdefault(setting.words, setting)
        if other is not setting:
            raise ConfigError(f"the settings {other.name!r} and {setting.name!r} are the same run; leave one out")


def _refuse_shared_places(plan: SweepPlan) -> None:
    """Refuse a file or a folder that several runs would write."""
    owners: dict[tuple[str, str], SweepRun] = {}
    for run in plan.runs:
        for name in _OF_ONE_RUN:
            flag = f"--{name.replace('_', '-')}"
            words = run.words
            for value in (words[index + 1] for index, word in enumerate(words) if word == flag):
                other = owners.setdefault((flag, value), run)
                if other is not run:
                    raise ConfigError(f"{name}={value} would be written by the runs {other.name!r} and {run.name!r}; "
                                      f"have each write its own, as in {name} = \"{PLACE_OF_RUN}/{Path(value).name}\"")
