"""Reads a TOML, YAML or JSON file into plain values, and refuses what such a file says twice."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.json_files import first_repeated, parse_json, read_text_file
from dsv3_megatron.config.output import json_text

_MAX_NODES, _MAX_NAME_PARTS = 100_000, 100
_ENDS_NAME = re.compile(r"[=,\n{}#]")
FORMATS = (".toml", ".yaml", ".yml", ".json")


def parse_file(path: str) -> dict[Any, Any]:
    """The content of a file.

    Raises:
        ConfigError: the file is missing, cannot be parsed, holds something else than names with values, or holds one
            name twice in the same place.
    """
    file = Path(path)
    if not os.path.isfile(path):  # False for what no path can be, too
        raise ConfigError(f"config={path}: no such file")
    if file.suffix not in FORMATS:
        raise ConfigError(f"config={path}: its name must end with {', '.join(FORMATS)}")
    try:
        content = _parse(file)
    except ConfigError as error:
        raise ConfigError(f"config={path}: {error}") from error
    except Exception as error:  # the parsers' own errors have no common class
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"config={path}: cannot be read as {file.suffix[1:].upper()}: {reason}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"config={path}: must hold fields and their values, not a {type(content).__name__}")
    return content


def _parse(file: Path) -> Any:
    text = read_text_file(file)
    if file.suffix == ".toml":
        return _parse_toml(text)
    if file.suffix in (".yaml", ".yml"):
        return _parse_yaml(text)
    return parse_json(text, object_pairs_hook=_without_repeats)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, each of whose names must be there once."""
    name = first_repeated(pairs)
    if name is not None:
        first, second = [value for other, value in pairs if other == name][:2]
        raise ConfigError(f"{name} is given twice in the same place, as {json_text(first)[:80]} and as "
                          f"{json_text(second)[:80]}; leave one out")
    return dict(pairs)


def _parse_toml(text: str) -> Any:
    import tomllib

    _refuse_long_names(text)
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        repeated = re.match(r"Cannot (?:overwrite a value|declare .* twice).*at line (\d+)", str(error))
        first = _first_line_like(text.splitlines(), int(repeated.group(1))) if repeated else None
        if repeated is None or first is None:
            raise
        name = text.splitlines()[int(repeated.group(1)) - 1].partition("=")[0].strip()
        raise ConfigError(f"{name} is given twice, at line {first} and at line {repeated.group(1)}; leave one "
                          "out") from error


def _refuse_long_names(text: str) -> None:
    """Refuse names of very many parts, such as a.a.a, for which tomllib takes the square of their number of steps."""
    run = 0
    for part in text.split("."):
        run = 0 if _ENDS_NAME.search(part) else run + 1
        if run > _MAX_NAME_PARTS:
            raise ConfigError(f"it has a name of more than {_MAX_NAME_PARTS} parts, {part.strip()[:40]!r} among them")


def _first_line_like(lines: list[str], number: int) -> int | None:
    """The first line that gives what line `number` of a TOML file gives: the same header, or name under that header."""
    def header_before(index: int) -> str:
        return next((line.strip() for line in reversed(lines[:index]) if line.lstrip().startswith("[")), "")

    wanted = lines[number - 1].partition("=")[0].strip()
    for index, line in enumerate(lines[:number - 1]):
        if line.partition("=")[0].strip() == wanted and (
                wanted.startswith("[") or header_before(index) == header_before(number - 1)):
            return index + 1
    return None


def _parse_yaml(text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """PyYAML's, which would take the last of two values, and let a few aliases stand for any number of them."""

        num_nodes = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            anchor = self.peek_event().anchor if self.check_event(yaml.AliasEvent) else None
            node = super().compose_node(parent, index)
            self.num_nodes += 1 if anchor is None else _num_nodes(node, _MAX_NODES)
            if self.num_nodes > _MAX_NODES:
                raise ConfigError(f"it stands for more than {_MAX_NODES} values"
                                  + ("" if anchor is None else f", with the alias {anchor} at line "
                                     f"{node.start_mark.line + 1}"))
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            lines: dict[Any, int] = {}
            for key, _ in node.value:
                if key.tag == "tag:yaml.org,2002:merge" or not isinstance(key, yaml.ScalarNode):
                    continue
                line = key.start_mark.line + 1
                if key.value in lines:
                    raise ConfigError(f"{key.value} is given twice, at line {lines[key.value]} and at line {line}; "
                                      "leave one out")
                lines[key.value] = line
            return super().construct_mapping(node, deep)

    return yaml.load(text, Loader=Loader)


def _num_nodes(node: Any, most: int) -> int:
    """Values that a YAML node stands for, its aliases written out; `most` + 1 where they are more, or without end."""
    count, waiting = 0, [node]
    while waiting and count <= most:
        found = waiting.pop()
        count += 1
        if isinstance(found.value, list):  # of nodes, or of pairs of them
            waiting += [part for entry in found.value for part in (entry if isinstance(entry, tuple) else (entry,))]
    return count
