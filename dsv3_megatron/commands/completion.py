"""Completion of `dsv3` by a shell: commands, flags and the values that a flag can have, made from the parsers.

    dsv3 completion bash > ~/.local/share/bash-completion/completions/dsv3
    dsv3 completion zsh > ~/.zfunc/_dsv3          with fpath+=~/.zfunc before compinit in .zshrc
    dsv3 completion fish > ~/.config/fish/completions/dsv3.fish

The script holds all that it needs, so that completing starts no Python. Make it again after an update.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from dsv3_megatron.config.load import CommandLine, build_parser
from dsv3_megatron.config.version import __version__

SHELLS = ("bash", "zsh", "fish")
# Commands that read a run's flags besides their own.
_WITH_A_RUNS_FLAGS = ("plan", "rehearse", "certify")


@dataclass(frozen=True)
class CompletedFlag:
    """A flag as a shell completes it.

    Attributes:
        names: Spellings, such as "--fp8" or "--async-save" and "--no-async-save".
        summary: Text of its help, a line.
        values: Values that it can have; empty: any.
        takes_value: Whether a value follows.
        takes_file: Whether that may be a file or a folder.
    """

    names: tuple[str, ...]
    summary: str
    values: tuple[str, ...] = ()
    takes_value: bool = False
    takes_file: bool = False


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="dsv3 completion", description=__doc__.partition("\n\n")[0],
                                     epilog=__doc__.partition("\n\n")[2],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shell", choices=SHELLS)
    options = parser.parse_args(arguments)
    from dsv3_megatron.commands.dispatch import COMMANDS  # which imports a command by its name

    summaries = {command.name: command.summary for command in COMMANDS}
    places = {place: flags for name in summaries for place, flags in flags_of_command(name).items()}
    print({"bash": bash_script, "zsh": zsh_script, "fish": fish_script}[options.shell](summaries, places), end="")
    return 0


def flags_of_command(name: str) -> dict[str, list[CompletedFlag]]:
    """The flags of a command, and of each of its subcommands as "command subcommand".

    Args:
        name: Name of the command.
    """
    parser = _parser_of(name)
    places = {name: _flags(parser)}
    if name in _WITH_A_RUNS_FLAGS:
        own = {spelling for flag in places[name] for spelling in flag.names}
        places[name] += [flag for flag in _flags(build_parser(CommandLine())) if not own & set(flag.names)]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            places |= {f"{name} {choice}": _flags(below) for choice, below in action.choices.items()}
    return places


# -- parsers -------------------------------------------------------------------------------------------


class _Caught(BaseException):
    """Raised in the place of reading words; `parser` would have read them."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__()
        self.parser = parser


@contextlib.contextmanager
def _catching() -> Iterator[None]:
    """Have every parser raise what catches it, instead of reading words."""
    def caught(self: argparse.ArgumentParser, args: object = None, namespace: object = None) -> NoReturn:
        raise _Caught(self)

    before = argparse.ArgumentParser.parse_known_args
    setattr(argparse.ArgumentParser, "parse_known_args", caught)
    try:
        yield
    finally:
        setattr(argparse.ArgumentParser, "parse_known_args", before)


def _parser_of(name: str) -> argparse.ArgumentParser:
    """The parser that a command reads its words with, caught when it is about to."""
    module = importlib.import_module(f"dsv3_megatron.commands.{name.replace('-', '_')}")
    if hasattr(module, "command_line"):
        return build_parser(module.command_line())
    if name == "train":
        return build_parser(CommandLine())
    with _catching(), contextlib.redirect_stderr(io.StringIO()):
        try:
            module.main([])
        except _Caught as caught:
            return caught.parser
    raise AssertionError(f"dsv3 {name} reads no words")


def _flags(parser: argparse.ArgumentParser) -> list[CompletedFlag]:
    found = []
    for action in parser._actions:
        names = tuple(name for name in action.option_strings if name.startswith("--"))
        if not names or action.help == argparse.SUPPRESS:
            continue
        values = tuple("none" if value is None else str(value) for value in action.choices or ())
        takes_value = action.nargs != 0
        is_number = getattr(action.type, "__name__", "") in ("int", "float", "number")
        found.append(CompletedFlag(names, _summary(action), values, takes_value,
                                   takes_value and not values and not is_number))
    return found


def _summary(action: argparse.Action) -> str:
    """The first words of a flag's help, without what argparse would fill in."""
    text = " ".join((action.help or "").replace("%%", "%").replace(" (%(default)s)", "").split())
    return text if len(text) <= 90 else text[:90].rpartition(" ")[0] + " ..."


# -- scripts -------------------------------------------------------------------------------------------


def _subcommands(places: Mapping[str, Sequence[CompletedFlag]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for place in places:
        command, _, below = place.partition(" ")
        if below:
            found.setdefault(command, []).append(below)
    return found


def bash_script(summaries: Mapping[str, str], places: Mapping[str, Sequence[CompletedFlag]]) -> str:
    """The script for bash.

    Args:
        summaries: The line about each command, by its name.
        places: The flags of each command and subcommand, by its words.
    """
    lines = [f"# Completion of dsv3 {__version__} by bash, made by `dsv3 completion bash`.", "_dsv3() {",
             '    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} place=${COMP_WORDS[1]}',
             '    local words=""', "    COMPREPLY=()", "    if ((COMP_CWORD == 1)); then",
             f"        COMPREPLY=($(compgen -W '{' '.join(summaries)}' -- \"$cur\"))", "        return", "    fi"]
    for command, below in _subcommands(places).items():
        lines += [f"    if [ \"$place\" = {command} ]; then", "        if ((COMP_CWORD == 2)); then",
                  f"            COMPREPLY=($(compgen -W '{' '.join(below)}' -- \"$cur\"))", "            return",
                  "        fi", '        place="$place ${COMP_WORDS[2]}"', "    fi"]
    lines.append('    case "$place $prev" in')
    for place, flags in places.items():
        lines += [f"        '{place} {flag.names[0]}') words='{' '.join(flag.values)}' ;;"
                  for flag in flags if flag.values]
    lines += ["    esac", '    if [ -z "$words" ] && [[ $cur == -* ]]; then', '        case "$place" in']
    lines += [f"            '{place}') words='{' '.join(name for flag in flags for name in flag.names)}' ;;"
              for place, flags in places.items()]
    # Without an answer bash completes names of files.
    lines += ["        esac", "    fi", '    [ -z "$words" ] || COMPREPLY=($(compgen -W "$words" -- "$cur"))', "}",
              "complete -o default -F _dsv3 dsv3", ""]
    return "\n".join(lines)


def zsh_script(summaries: Mapping[str, str], places: Mapping[str, Sequence[CompletedFlag]]) -> str:
    """The script for zsh, with what each flag means; arguments as in `bash_script`."""
    def quoted(text: str) -> str:
        return "'" + text.replace("'", "'\\''") + "'"

    def explained(text: str) -> str:
        return text.replace("\\", "").replace("[", "(").replace("]", ")").replace(":", "\\:")

    def spec(name: str, flag: CompletedFlag) -> str:
        after = ""
        if flag.values and name == flag.names[0]:
            after = f":value:({' '.join(flag.values)})"
        elif flag.takes_value:
            after = ":file:_files" if flag.takes_file else ":value: "
        return quoted(f"{name}[{explained(flag.summary)}]{after}")

    lines = ["#compdef dsv3", f"# Completion of dsv3 {__version__} by zsh, made by `dsv3 completion zsh`.", "_dsv3() {",
             "    local -a flags commands", "    local place=$words[2]", "    if ((CURRENT == 2)); then",
             "        commands=(",
             *(f"            {quoted(f'{name}:{summary}')}" for name, summary in summaries.items()),
             "        )", "        _describe command commands", "        return", "    fi"]
    for command, below in _subcommands(places).items():
        lines += [f"    if [[ $place == {command} ]]; then", "        if ((CURRENT == 3)); then",
                  f"            compadd {' '.join(below)}", "            return", "        fi",
                  '        place="$place $words[3]"', "    fi"]
    lines.append('    case "$place" in')
    for place, flags in places.items():
        lines += [f"        {quoted(place)}) flags=(", *(f"            {spec(name, flag)}" for flag in flags
                                                         for name in flag.names), "        ) ;;"]
    lines += ["    esac", "    shift words", "    ((CURRENT--))", "    _arguments $flags '*:file:_files'", "}",
              'if [[ $funcstack[1] == _dsv3 ]]; then', '    _dsv3 "$@"', "else", "    compdef _dsv3 dsv3", "fi", ""]
    return "\n".join(lines)


def fish_script(summaries: Mapping[str, str], places: Mapping[str, Sequence[CompletedFlag]]) -> str:
    """The script for fish, with what each flag means; arguments as in `bash_script`."""
    def quoted(text: str) -> str:
        return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"

    lines = [f"# Completion of dsv3 {__version__} by fish, made by `dsv3 completion fish`."]
    lines += [f"complete -c dsv3 -n __fish_use_subcommand -f -a {name} -d {quoted(summary)}"
              for name, summary in summaries.items()]
    below = _subcommands(places)
    for place, flags in places.items():
        command, _, sub = place.partition(" ")
        seen = f"__fish_seen_subcommand_from {command}"
        if sub:
            lines.append(f"complete -c dsv3 -n '{seen}; and not __fish_seen_subcommand_from {' '.join(below[command])}'"
                         f" -f -a {sub}")
            seen += f"; and __fish_seen_subcommand_from {sub}"
        for flag in flags:
            value = ""
            if flag.values:
                value = f" -x -a {quoted(' '.join(flag.values))}"
            elif flag.takes_value:
                value = " -r -F" if flag.takes_file else " -x"
            lines += [f"complete -c dsv3 -n '{seen}' -l {name[2:]}{value} -d {quoted(flag.summary)}"
                      for name in flag.names]
    return "\n".join([*lines, ""])
