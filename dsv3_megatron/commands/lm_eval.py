"""lm-evaluation-harness on a checkpoint, of a run or in Hugging Face's format: its tasks and its runner, our model.

    dsv3 lm-eval --load checkpoints --tasks hellaswag lambada_openai --batch_size 8
    dsv3 lm-eval --load DeepSeek-V3/ --tasks gsm8k --num_fewshot 5 --output_path results --log_samples
    torchrun --nproc-per-node 4 -m dsv3_megatron lm-eval --load checkpoints --tasks mmlu \
        --pipeline-model-parallel-size 2 --expert-model-parallel-size 2

Flags of this library, with hyphens, say which model it is and how it is divided; all others are the harness's own, with
its underscores, and go to its runner as they are. The first process runs the harness; the others answer with it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.load import Parser, add_precision, add_section, add_verify_files, given_fields
from dsv3_megatron.config.packages import is_installed
from dsv3_megatron.process.logs import configure_logging
from dsv3_megatron.process.ranks import Processes
from dsv3_megatron.runs.rank import check_and_run, prepare_rank, refuse

if TYPE_CHECKING:
    from dsv3_megatron.runs.answering_run import AnsweringRun

REMEDY = "pip install 'lm-eval>=0.4.13'"
# Flags of the harness whose part flags of this command have.
_OURS = {"--model": "--load", "-M": "--load", "--model_args": "--load", "-a": "--load",
         "--device": "the device that is there"}


@dataclass(frozen=True)
class HarnessRequest:
    """Which model answers, and what the harness is asked.

    Attributes:
        load: Folder of a run's checkpoints, saved under any layout, or of a Hugging Face checkpoint.
        words: Words for the harness's own runner, such as ("--tasks", "hellaswag").
        tokenizer_model: Folder of the tokenizer; None: the checkpoint's.
        precision: "auto", "bf16", "fp32"; None: as the checkpoint was trained, "auto" if it does not say.
        max_length: Most tokens that the model reads; None: its context.
        parallel: The layout: fields of ParallelConfig.
        verify_files: How far the checkpoint is compared with its checksums: "read", "all" or "none".
    """

    load: str
    words: tuple[str, ...]
    tokenizer_model: str | None = None
    precision: str | None = None
    max_length: int | None = None
    parallel: Mapping[str, Any] = field(default_factory=dict)
    verify_files: str = "read"


@dataclass(frozen=True)
class _CheckedRequest:
    """A request that can be met: the model's run, and the harness's arguments, in the process that runs it."""

    answering: AnsweringRun
    options: Any


def carry_out(request: HarnessRequest) -> int:
    """Run one process of the harness; the first one prints its table to stdout.

    Returns:
        Exit code, as `runs.rank.check_and_run` gives it.
    """
    def check(processes: Processes) -> _CheckedRequest:
        processes.require_rank()
        prepare_rank()
        from dsv3_megatron.runs.answering_run import check_answering_run

        answering = check_answering_run(
            request.load, parallel=request.parallel, world_size=processes.world_size,
            tokenizer_model=request.tokenizer_model, precision=request.precision, max_length=request.max_length,
            verify_files=request.verify_files)
        return _CheckedRequest(answering, _harness_options(request) if processes.rank == 0 else None)

    def work(rank: int, checked: _CheckedRequest) -> int:
        configure_logging(rank)
        return _answer(request.load, checked)

    return check_and_run(check, work, left="no result was written")


def _harness_options(request: HarnessRequest) -> Any:
    """The harness's arguments, read by its own parser.

    Raises:
        ConfigError: the harness is not installed or does not take the words.
    """
    if not is_installed("lm_eval"):
        raise ConfigError(f"dsv3 lm-eval needs the package lm-eval, which is not installed: {REMEDY}")
    from lm_eval._cli.harness import HarnessCLI
    from lm_eval.utils import setup_logging

    from dsv3_megatron.runs.harness_model import parse_batch_size

    setup_logging()
    for word in request.words:
        if (flag := word.partition("=")[0]) in _OURS:
            raise ConfigError(f"{flag} is not for this command: the model is that of --load, on {_OURS['--device']}; "
                              "leave it out")
    words = sys.argv
    try:
        sys.argv = ["lm-eval", "run", *request.words]
        options = HarnessCLI().parse_args()
    except SystemExit as end:
        raise ConfigError("the harness does not take these flags; `lm-eval run --help` lists its own, `dsv3 lm-eval "
                          "--help` this library's") from end
    finally:
        sys.argv = words
    parse_batch_size(getattr(options, "batch_size", 1))
    return options


def _answer(load: str, checked: _CheckedRequest) -> int:
    from dsv3_megatron.parallel.groups import destroy_groups

    model = checked.answering.build()
    if not model.is_asking:
        model.follow()
        destroy_groups()
        return 0
    from dsv3_megatron.runs.harness_model import HarnessModel

    options = checked.options
    asked = HarnessModel(model, batch_size=getattr(options, "batch_size", 1))
    # What the harness names its results by; the model is there already.
    options.model, options.model_args = asked, {"pretrained": load}
    try:
        options.func(options)
    except (ValueError, FileNotFoundError, TypeError, KeyError) as error:
        if asked.was_asked or isinstance(error, ConfigError):
            raise
        raise ConfigError(f"lm-eval: {error}") from error
    finally:
        model.end()
    destroy_groups()
    return 0


def _parse_arguments(arguments: Sequence[str] | None) -> HarnessRequest:
    parser = Parser(
        prog="dsv3 lm-eval", allow_abbrev=False,
        usage="dsv3 lm-eval --load DIR --tasks TASK ... [FLAGS] [flags of lm-eval run]",
        description="lm-evaluation-harness on a checkpoint. All flags but those below go to the harness's own runner: "
        "--tasks, --include_path, --num_fewshot, --batch_size, --limit, --gen_kwargs, --apply_chat_template, "
        "--output_path, --log_samples, --use_cache and more; `lm-eval run --help` lists them.",
        epilog="Started by torchrun for several processes, under any layout; alone without.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=44, width=130))
    add = parser.add_argument_group("model").add_argument
    add("--load", required=True, metavar="DIR", help="folder of checkpoints that a run saved (the newest is used), or "
        "of a Hugging Face checkpoint")
    add("--tokenizer-model", metavar="DIR", help="tokenizer (default: the one the checkpoint was trained with)")
    add_precision(add)
    add("--max-length", type=int, metavar="N", help="most tokens that the model reads (default: its context)")
    add_verify_files(add, "the checkpoint")
    add_section(parser, "parallel")
    known, words = parser.parse_known_args(arguments)
    options = vars(known)
    return HarnessRequest(
        load=options["load"], words=tuple(words), tokenizer_model=options["tokenizer_model"],
        precision=options["precision"], max_length=options["max_length"],
        parallel=given_fields(options, ["parallel"]), verify_files=options["verify_files"])


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status (2 for input that the user can correct)."""
    try:
        request = _parse_arguments(arguments)
    except ConfigError as error:
        return refuse(str(error))
    return carry_out(request)
