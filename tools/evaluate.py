#!/usr/bin/env python3
"""Loss and perplexity of a checkpoint, of a run or in Hugging Face's format, on a dataset or on given token ids.

    python tools/evaluate.py --load checkpoints --data-path data/valid_text_document
    python tools/evaluate.py --load DeepSeek-V3/ --tokens ids.npy --logprobs logprobs.npy --json
    torchrun --nproc-per-node 4 tools/evaluate.py --load checkpoints --pipeline-model-parallel-size 2 \
        --expert-model-parallel-size 2 --data-path data/valid_text_document
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout that is not installed

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.load import Parser, add_section, given_fields
from dsv3_megatron.config.streams import run_command
from dsv3_megatron.config.training import DOCUMENT_SWITCHES, PRECISIONS, TRANSFORMER_IMPLS, DataConfig
from dsv3_megatron.evaluate import Request
from dsv3_megatron.evaluate import main as evaluate
from dsv3_megatron.train import refuse

_ABOUT_DOCUMENTS = """\
Each switch is as the run was trained, and off for Hugging Face, unless it is given here; a line on stderr says what is
in force. The token that ends a document (EOD) is the one that the dataset's sidecar names, or else the tokenizer. In
--tokens documents end where the EOD is, as named by --tokenizer-model, the data the run was trained on, its tokenizer,
or the one in Hugging Face's folder; if none of them is there, the switches of training fall away."""


def _add_document_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("documents", _ABOUT_DOCUMENTS).add_argument
    helps = {item.name: item.metadata["help"] for item in dataclasses.fields(DataConfig)}
    for name in DOCUMENT_SWITCHES:
        add(f"--{name.replace('_', '-')}", action=argparse.BooleanOptionalAction, help=helps[name])
    add("--tokenizer-model", metavar="DIR", help="tokenizer that made the data (default: the run's, or the one in "
        "Hugging Face's folder, if it is there)")


def _parse_arguments(arguments: list[str] | None) -> Request:
    parser = Parser(
        allow_abbrev=False, description="Loss and perplexity of a checkpoint on a dataset or on given token ids.",
        epilog="Started by torchrun for several processes, under any layout; alone without.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=44, width=130))
    add = parser.add_argument_group("model and data").add_argument
    add("--load", required=True, metavar="DIR", help="folder of checkpoints that a run saved (the newest is used), or "
        "of a Hugging Face checkpoint")
    add("--data-path", metavar="PREFIX", help="dataset PREFIX.bin and PREFIX.idx; each token but the first is "
        "predicted once, in file order")
    add("--tokens", metavar="FILE", help="integer array [batch, seq] of token ids in .npy format")
    add("--seq-length", type=int, metavar="N", help="with --data-path: tokens predicted in a row (default: as trained)")
    add = parser.add_argument_group("how").add_argument
    add("--micro-batch-size", type=int, default=1, metavar="N", help="rows in one forward pass (%(default)s)")
    add("--precision", choices=PRECISIONS, help="of weights and activations (default: as trained; auto for Hugging "
        "Face)")
    add("--ema", action="store_true", help="evaluate the moving average of the weights that the run kept (--ema-decay)")
    add("--transformer-impl", choices=TRANSFORMER_IMPLS, default="auto", help="modules to build from (%(default)s)")
    _add_document_flags(parser)
    add = parser.add_argument_group("output").add_argument
    add("--logprobs", metavar="FILE", help="with --tokens: write the log-probability of each next token, counted "
        "or not, float32 [batch, seq - 1], in .npy format")
    add("--json", action="store_true", help="print one JSON object; as in training, mtp_losses are sums over the "
        "positions that have a target, divided by all tokens")
    add_section(parser, "parallel")
    options = vars(parser.parse_args(arguments))
    return Request(
        load=options["load"], data_path=options["data_path"], tokens=options["tokens"], logprobs=options["logprobs"],
        seq_length=options["seq_length"], micro_batch_size=options["micro_batch_size"], precision=options["precision"],
        transformer_impl=options["transformer_impl"], parallel=given_fields(options, ["parallel"]),
        switches={name: options[name] for name in DOCUMENT_SWITCHES if options[name] is not None},
        tokenizer_model=options["tokenizer_model"], as_json=options["json"], ema=options["ema"])


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status (2 for input that the user can correct)."""
    try:
        request = _parse_arguments(arguments)
    except ConfigError as error:
        return refuse(str(error))
    return evaluate(request)


if __name__ == "__main__":
    run_command(main)
