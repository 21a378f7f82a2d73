"""The command `dsv3`: a table of what it can do, and the way to each of it.

Nothing but the asked command's module is imported, so that `dsv3 --help` answers at once.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from dsv3_megatron.config.streams import run_command
from dsv3_megatron.config.version import __version__
from dsv3_megatron.process.stop import end_with_a_line

EXIT_USAGE = 2


@dataclass(frozen=True)
class Command:
    """One thing that `dsv3` does.

    Attributes:
        name: What is typed after `dsv3`. Its module has the same name, with _ for -.
        summary: Text for the table of `dsv3 --help`, a line.
        left: Text about what a signal that ends the command leaves behind, for the line that is printed then. None: the
            command listens to signals itself.
    """

    name: str
    summary: str
    left: str | None = None


COMMANDS = (
    Command("train", "train a model, as one process of a run"),
    Command("sft", "fine-tune a model on conversations"),
    Command("grpo", "let a model learn from its own answers"),
    Command("sweep", "settings x seeds of a run, as a table", "the same command goes on"),
    Command("preprocess", "text to tokens on disk (.bin, .idx)", "--resume goes on"),
    Command("train-tokenizer", "learn a tokenizer from text", "nothing was written"),
    Command("merge", "join datasets end to end", "nothing was published"),
    Command("inspect", "look at a dataset, or verify it", "nothing was changed"),
    Command("verify", "whether checkpoints are what was written", "nothing was changed"),
    Command("convert", "checkpoints to Hugging Face's format and back",
            "the same command goes on from what is finished"),
    Command("evaluate", "loss and perplexity of a checkpoint"),
    Command("generate", "text from a checkpoint"),
    Command("lm-eval", "lm-evaluation-harness on a checkpoint"),
    Command("plan", "time, memory and cost of a run before it starts", "nothing was written"),
    Command("report", "DeepSeek-V3's report, figure by figure", "nothing was written"),
    Command("rehearse", "ranks of a GPU run on a machine without a GPU", "nothing was written"),
    Command("certify", "whether a layout computes what one process does", "nothing was written"),
    Command("simulate", "a pipeline schedule on paper", "nothing was written"),
    Command("draw-schedule", "what the ranks of a run did when", "nothing was written"),
    Command("plot", "a run's measurements as one page", "nothing was written"),
    Command("rendezvous", "where the nodes of an elastic run meet"),
    Command("doctor", "what is installed and what is missing here", "nothing was changed"),
    Command("completion", "a script with which a shell completes all this", "nothing was written"),
)


def usage() -> str:
    """The table of commands, as `dsv3 --help` prints it."""
    width = max(len(command.name) for command in COMMANDS)
    lines = [f"  {command.name:<{width}}  {command.summary}" for command in COMMANDS]
    return "\n".join((
        "usage: dsv3 COMMAND [FLAGS]", "",
        "Train DeepSeek-V3-style models on Megatron-Core: from raw text to weights that Hugging Face loads.", "",
        "commands:", *lines, "",
        "dsv3 COMMAND --help lists the flags of a command. Several processes: torchrun ... -m dsv3_megatron COMMAND."))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `dsv3` with the given words, by default those of the command line.

    Returns:
        Exit code: the command's, or 2 for a command that does not exist.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] in (["--version"], ["-V"]):
        print(f"dsv3_megatron {__version__}")
        return 0
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage(), file=sys.stdout if words else sys.stderr)
        return 0 if words else EXIT_USAGE
    named = {command.name: command for command in COMMANDS}
    if words[0] not in named:
        print(f"error: dsv3 has no command {words[0]!r}; there are {', '.join(named)}", file=sys.stderr)
        return EXIT_USAGE
    return _carry_out(named[words[0]], words[1:])


def _carry_out(command: Command, words: list[str]) -> int:
    module = importlib.import_module(f"dsv3_megatron.commands.{command.name.replace('-', '_')}")
    if command.left is None:
        return int(module.main(words))
    return end_with_a_line(lambda: int(module.main(words)), command.left)


def run() -> NoReturn:
    """Run `dsv3` as the whole of a process: the installed command, and `python -m dsv3_megatron`."""
    run_command(main)


def run_named(name: str) -> NoReturn:
    """Run one command as the whole of a process, with the words of the command line: the scripts of tools/."""
    run_command(lambda: main([name, *sys.argv[1:]]))
