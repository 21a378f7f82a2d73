"""Reads the command line and the file it names into one validated RunConfig.

A run starts from a preset, or with the architecture of a model's `config.json`; a TOML, YAML or JSON file changes
fields of it; the command line changes them again. The flags are made from the fields, so `--help` cannot disagree with
what is read.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from dsv3_megatron.config.family_json import model_of_folder
from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.files import parse_file
from dsv3_megatron.config.megatron_flags import BY_NAME
from dsv3_megatron.config.megatron_values import apply_flags, require_yarn, take_flags
from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.config.phases import Phase, read_phases
from dsv3_megatron.config.presets import HUGGING_FACE, PRESETS, preset, run_of_model
from dsv3_megatron.config.run import SECTIONS, RunConfig, section_of
from dsv3_megatron.config.training import PRECISIONS, VERIFY_FILES, WITHOUT_PHASES
from dsv3_megatron.config.values import is_optional, kind_of, read_field, read_value

_GROUP_TITLES = {
    "model": "model (without a default: the preset's)",
    "parallel": "split over processes",
    "training": "training",
    "data": "data",
    "checkpoint": "checkpoints",
    "logging": "logs",
    "guards": "guards: steps that are not applied, spikes, hangs",
    "fp8": "FP8",
    "policy": "GRPO: answers of its own that a model learns from (dsv3 grpo)",
}

# What a run starts from: names of a command line and of a file that are no fields.
_STARTS = ("preset", "from_hf")
_MODEL_FIELDS = {field.name for field in dataclasses.fields(ModelConfig)}


@dataclass(frozen=True)
class TrainingRequest:
    """The run that the command line asks for, and what to do with it.

    Attributes:
        run: The resolved run, not yet validated against the number of processes.
        print_model: Print the parameter table and stop.
        print_schedule: Print the table of the run's phases and stop.
        plot_schedule: Draw them into this PNG and stop; None: no picture.
        as_json: Print as JSON.
        check_only: Validate the run and its inputs and stop.
        world_size: Number of processes to plan for; None: as many as there are.
        hardware: Name of the machine whose memory the check compares with; None: this one.
        allow_memory_overflow: Whether to start although the estimate of memory is more than a GPU has.
        notes: What is to be said of Megatron-LM's own flags, a line each.
    """

    run: RunConfig
    print_model: bool
    print_schedule: bool
    plot_schedule: str | None
    as_json: bool
    check_only: bool
    world_size: int | None
    hardware: str | None = None
    allow_memory_overflow: bool = False
    notes: tuple[str, ...] = ()


class Parser(argparse.ArgumentParser):
    """Reports a wrong flag as a ConfigError, like every other wrong value, and one that is given twice too."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """argparse's, which would take the last of two values."""
        words = list(sys.argv[1:] if args is None else args)
        self._refuse_repeats(words)
        return super().parse_known_args(words, namespace)

    def _refuse_repeats(self, words: list[str]) -> None:
        given: dict[str, str] = {}
        for index, word in enumerate(words):
            if word == "--":
                return
            flag = word.partition("=")[0]
            action = self._option_string_actions.get(flag)
            if not word.startswith("--") or action is None or action.dest == "help":
                continue
            values = itertools.takewhile(lambda value: not value.startswith("--"), words[index + 1:])
            text = " ".join((word, *values))
            if action.dest in given:
                raise ConfigError(f"{flag} is given twice: {given[action.dest]} and {text}; leave one out")
            given[action.dest] = text

    def error(self, message: str) -> NoReturn:
        """Raise a ConfigError with argparse's message, instead of printing it and ending the process."""
        raise ConfigError(f"{message}; see --help")


@dataclass(frozen=True)
class CommandLine:
    """What one command that trains has of its own.

    Attributes:
        prog: Name of the command in messages.
        usage: First line of its help.
        description: Text of its help.
        begin: Makes the run that flags and file change, of the preset or model that they start from, None where none is
            given, and of the fields that they give.
        add_flags: Gives a parser the command's own flags.
    """

    prog: str = "pretrain_dsv3.sh"
    usage: str = "bash examples/pretrain_dsv3.sh [--preset NAME] [--from-hf FOLDER] [--config FILE] [flags]"
    description: str = "Pretrain a DeepSeek-V3-style model. Without arguments: the quickstart."
    begin: Callable[[RunConfig | None, Mapping[str, Any]], RunConfig] = lambda start, fields: start or preset("tiny")
    add_flags: Callable[[argparse.ArgumentParser], None] = lambda parser: None


def build_parser(line: CommandLine | None = None) -> argparse.ArgumentParser:
    """The command line: a flag for each field of each section of RunConfig, and those of one command."""
    line = line or CommandLine()
    parser = Parser(
        prog=line.prog, allow_abbrev=False, usage=line.usage, description=line.description,
        epilog="Other flags of Megatron-LM's DeepSeek-V3 recipes: docs/megatron_lm_flags.md says what becomes of each.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=44, width=130))
    start = parser.add_argument_group("run")
    start.add_argument("--preset", choices=sorted(PRESETS), help="named run to start from (default: tiny)")
    start.add_argument("--from-hf", metavar="FOLDER", help="take the architecture of this folder's config.json, of any "
                       "model of DeepSeek-V3's family, in place of the preset's; weights are not read")
    start.add_argument("--config", metavar="FILE", help="TOML, YAML or JSON file with fields to change; flags change "
                       "them again")
    start.add_argument("--print-model", action="store_true", help="print parameters, FLOPs and bytes per rank, "
                       "and stop")
    start.add_argument("--print-schedule", action="store_true", help="print where steps, tokens, learning rate, batch, "
                       "loss weights and sequence length change over the run, and stop")
    start.add_argument("--plot-schedule", metavar="FILE.png", help="draw the same, and stop")
    start.add_argument("--json", action="store_true", dest="as_json", help="with --print-model or --print-schedule: as "
                       "JSON")
    start.add_argument("--check-only", action="store_true", help="check the run and its inputs, and stop")
    start.add_argument("--world-size", type=_reader(int, lambda word: read_value("world_size", word, "int")),
                       metavar="N",
                       help="with --print-model, --print-schedule or --check-only: processes to plan for")
    start.add_argument("--hardware", metavar="NAME", help="with --check-only: the machine that the run is for, as dsv3 "
                       "plan names it, such as h800; its memory is what the estimate is compared with")
    start.add_argument("--allow-memory-overflow", action="store_true", help="start although the estimate of memory is "
                       "more than a GPU has")
    line.add_flags(parser)
    for section in SECTIONS:
        add_section(parser, section)
    return parser


def add_section(parser: argparse.ArgumentParser, section: str) -> None:
    """Give a command line the flags of one section of a run; `given_fields` reads them back."""
    group = parser.add_argument_group(_GROUP_TITLES[section])
    for field in dataclasses.fields(SECTIONS[section]):
        _add_flag(group, field)


def add_precision(add: Callable[..., Any]) -> None:
    """Give a command that reads a checkpoint the flag --precision, by a parser's or a group's `add_argument`."""
    add("--precision", choices=PRECISIONS, help="of weights and activations (default: as trained; auto for Hugging "
        "Face)")


def add_verify_files(add: Callable[..., Any], what: str) -> None:
    """Give a command that reads files with checksums the flag --verify-files; `what` names them in its help."""
    add("--verify-files", choices=VERIFY_FILES, default="read", help=f"what of {what} is compared with its checksums: "
        "what is read, all before any is used, or none (%(default)s)")


def given_fields(options: Mapping[str, Any], sections: Iterable[str] = tuple(SECTIONS)) -> dict[str, Any]:
    """The fields of these sections, by name, whose flags were given."""
    known = {field.name for section in sections for field in dataclasses.fields(SECTIONS[section])}
    return {name: value for name, value in options.items() if name in known and value is not _UNSET}


def parse_command(arguments: Sequence[str]) -> TrainingRequest:
    """Read the command line of a pretraining and the file it names.

    Raises:
        ConfigError: a flag, a field, a preset or a file is unknown, or a value is of the wrong type.
        SystemExit: `--help` was asked for and has been printed.
    """
    return parse_line(arguments, CommandLine())[0]


def parse_line(arguments: Sequence[str], line: CommandLine) -> tuple[TrainingRequest, dict[str, Any]]:
    """Read the command line of a command that trains, and the file it names.

    Args:
        arguments: Words of the command line.
        line: The command.

    Returns:
        The request; and what was given: fields of the run, and the values of the command's own flags.

    Raises:
        ConfigError: an unknown flag, field, preset or file, or a value of the wrong type.
        SystemExit: `--help` was asked for and has been printed.
    """
    words, of_megatron = take_flags(arguments)
    given = _given(words, line)
    from_file = read_config_file(given["config"]) if given["config"] is not None else {}
    start = _start(given, from_file)
    from_file = {field: value for field, value in from_file.items() if field not in _STARTS}
    flags = given_fields(given)
    if flags.get("phases"):  # they take the place of what the file says without phases
        from_file = {field: value for field, value in from_file.items() if field not in WITHOUT_PHASES}
    begun = line.begin(start, from_file | flags)
    run, notes = apply_flags(of_megatron, begun.override(**from_file | flags), flags)
    require_yarn(run, flags)
    request = TrainingRequest(
        run, given["print_model"], given["print_schedule"], given["plot_schedule"], given["as_json"],
        given["check_only"], given["world_size"], given["hardware"], given["allow_memory_overflow"], tuple(notes))
    fields = {field.name for section in SECTIONS.values() for field in dataclasses.fields(section)}
    return request, from_file | flags | {name: value for name, value in given.items() if name not in fields}


def read_config_file(path: str) -> dict[str, Any]:
    """Fields to change, by name, from a file whose sections are those of RunConfig (or that has none).

    Raises:
        ConfigError: the file is missing, cannot be parsed, has a field or a type that no run has, or has a field twice
            or in a section that is not its own.
    """
    changes: dict[str, Any] = {}
    places: dict[str, str] = {}
    for key, value in parse_file(path).items():
        try:
            for place, name, entry in _entries(str(key), value):  # YAML's keys may be anything
                if name in places:
                    raise ConfigError(f"{name} is given twice, {places[name]} and {place}; leave one out")
                places[name] = place
                changes[name] = entry if name in _STARTS else read_field(_field(name), entry)
        except ConfigError as error:
            raise ConfigError(f"config={path}: {error}") from error
    return changes


def _entries(key: str, value: Any) -> Iterator[tuple[str, str, Any]]:
    """Place, name and value of each field that one entry of a file gives: a field, or a section of them."""
    if key not in SECTIONS:
        if isinstance(value, dict):
            raise ConfigError(f"{key} is not a section of a run; they are {', '.join(SECTIONS)}")
        yield "outside the sections", key, value
        return
    if value is None:  # a section in YAML of which nothing but comments is left
        return
    if not isinstance(value, dict):
        raise ConfigError(f"{key} is not a field of a run but a section, which holds fields")
    for name, entry in value.items():
        if name in _STARTS:
            raise ConfigError(f"{name}, in section {key}, is of the run; write it outside the sections")
        owner = section_of(str(name))
        if owner != key:
            raise ConfigError(f"{name}, in section {key}, is a field of section {owner}; write it there, or outside "
                              "the sections")
        yield f"in section {key}", str(name), entry


def _start(given: Mapping[str, Any], from_file: Mapping[str, Any]) -> RunConfig | None:
    """The run that flags or a file name to start from; None: they name none."""
    name, folder = (given[key] or from_file.get(key) for key in _STARTS)
    # A file with every field of the architecture, as runs write it, has no need of the folder that they came from.
    stated = {field: from_file[field] for field in _MODEL_FIELDS if field in from_file}
    is_whole = len(stated) == len(_MODEL_FIELDS) and given["from_hf"] is None
    if folder is None:
        if name == HUGGING_FACE and is_whole:
            return run_of_model(ModelConfig(**stated))
        return None if name is None else preset(name)
    if not isinstance(folder, str) or not folder.strip():
        raise ConfigError(f"from_hf={folder!r} must be a folder with a model's config.json")
    try:
        model = ModelConfig(**stated) if is_whole else model_of_folder(folder)
    except ConfigError as error:
        raise ConfigError(f"from_hf={folder}: {error}") from error
    run = run_of_model(model) if name in (None, HUGGING_FACE) else dataclasses.replace(preset(name), model=model)
    run = dataclasses.replace(run, from_hf=os.path.abspath(folder))
    longest = model.max_position_embeddings
    return run.override(seq_length=longest) if run.training.seq_length > longest else run


_UNSET: Any = object()


def _given(arguments: Sequence[str], line: CommandLine) -> dict[str, Any]:
    """The command line's values by field; refuses what no flag takes, naming the flags it may have meant."""
    parser = build_parser(line)
    known, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        import difflib

        wrong = next((word for word in unknown if word.startswith("-")), unknown[0]).split("=")[0]
        flags = [flag for action in parser._actions for flag in action.option_strings] + list(BY_NAME)
        close = difflib.get_close_matches(wrong, flags, n=3)
        raise ConfigError(f"{wrong} is not a flag" + (f"; did you mean {' or '.join(close)}?" if close
                                                      else "; see --help"))
    given = vars(known)
    if given["as_json"] and not (given["print_model"] or given["print_schedule"]):
        raise ConfigError("--json says how --print-model and --print-schedule print; give one of them too")
    if given["plot_schedule"] is not None and not given["plot_schedule"].endswith(".png"):
        raise ConfigError(f"--plot-schedule={given['plot_schedule']} must end with .png: that is what is drawn")
    if given["hardware"] is not None and not given["check_only"]:
        raise ConfigError(f"--hardware={given['hardware']} is for --check-only; a run takes the machine that it is on")
    if given["world_size"] is not None:
        if not (given["print_model"] or given["print_schedule"] or given["check_only"]):
            raise ConfigError(f"--world-size={given['world_size']} is for --print-model, --print-schedule and "
                              "--check-only; a run has as many processes as were started (--nproc-per-node of "
                              "torchrun)")
        if given["world_size"] < 1:
            raise ConfigError(f"--world-size={given['world_size']} must be at least 1")
    return given


def _field(name: str) -> dataclasses.Field:
    return next(field for field in dataclasses.fields(SECTIONS[section_of(name)]) if field.name == name)


@functools.cache
def _preset_runs() -> tuple[RunConfig, ...]:
    return tuple(make() for make in PRESETS.values())


def _add_flag(group: Any, field: dataclasses.Field) -> None:
    metadata = field.metadata
    flag = "--" + (metadata["flag"] or field.name.replace("_", "-"))
    # A default is shown where it is the same in every preset; elsewhere it is the preset's.
    defaults = {repr(getattr(getattr(run, section_of(field.name)), field.name)) for run in _preset_runs()}
    default = next(iter(defaults))
    is_shown = len(defaults) == 1 and default not in ("None", "[]", "()")
    shown = f" (default: {default.strip(chr(39))})" if is_shown else ""
    text = metadata["help"].replace("%", "%%") + shown
    options: dict[str, Any] = {"dest": field.name, "default": _UNSET, "help": text}
    if metadata["read"] is read_phases:
        group.add_argument(flag, type=_phases_of_file, metavar="FILE", **options)
        return
    annotation = str(field.type)
    kind = kind_of(annotation)
    if kind is bool:  # --flag and --no-flag; left out, it is not among the given values
        options |= {"action": argparse.BooleanOptionalAction, "default": argparse.SUPPRESS}
    elif metadata["nargs"]:
        options |= {"nargs": metadata["nargs"], "metavar": "X"}
    else:
        options["type"] = _reader(kind, functools.partial(read_field, field))
        if metadata["choices"]:
            takes_none = is_optional(annotation)
            options["choices"] = (*metadata["choices"], *[None] * takes_none)
            options["metavar"] = "{" + ",".join((*metadata["choices"], *["none"] * takes_none)) + "}"
        else:
            options["metavar"] = {int: "N", float: "X", str: "TEXT"}[kind]
    group.add_argument(flag, **options)


def _reader(kind: type, read: Callable[[str], Any]) -> Callable[[str], Any]:
    """A reader of a flag's word under the name that argparse's errors give it."""
    def named(word: str) -> Any:
        return read(word)

    named.__name__ = kind.__name__
    return named


def _phases_of_file(path: str) -> tuple[Phase, ...]:
    """The phases that a file holds and nothing else; none of them for "none"."""
    if path.lower() == "none":
        return ()
    try:
        changes = read_config_file(path)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("config=")) from error
    if changes.keys() != {"phases"}:
        others = ", ".join(sorted(changes.keys() - {"phases"})) or "no phases"
        raise argparse.ArgumentTypeError(f"{path} must hold phases and nothing else; it has {others}: give a whole run "
                                         "with --config")
    return changes["phases"]
