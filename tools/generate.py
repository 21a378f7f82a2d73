#!/usr/bin/env python3
"""Text from a checkpoint, of a run or in Hugging Face's format, printed as it is generated.

    python tools/generate.py --load checkpoints --prompt "def main(" --max-new-tokens 100
    python tools/generate.py --load DeepSeek-V3/ --prompts prompts.jsonl --batch-size 8 --json > texts.jsonl
    python tools/generate.py --load checkpoints --prompt "Once" --temperature 0.8 --top-p 0.95 --speculative mtp
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout that is not installed

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.load import Parser
from dsv3_megatron.config.streams import run_command
from dsv3_megatron.config.training import PRECISIONS
from dsv3_megatron.generate import Request
from dsv3_megatron.generate import main as generate


def _parse_arguments(arguments: list[str] | None) -> Request:
    parser = Parser(
        allow_abbrev=False, description="Text from a checkpoint, printed as it is generated.",
        epilog="One process; checkpoints saved under any layout load. Texts go to stdout, speed to stderr.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=44, width=130))
    add = parser.add_argument_group("model and prompts").add_argument
    add("--load", required=True, metavar="DIR", help="folder of checkpoints that a run saved (the newest is used), or "
        "of a Hugging Face checkpoint")
    add("--prompt", metavar="TEXT", help="text to continue")
    add("--prompts", metavar="FILE", help='JSON lines, {"prompt": "..."} in each; - reads standard input')
    add("--tokenizer-model", metavar="DIR", help="tokenizer (default: the one the checkpoint was trained with)")
    add = parser.add_argument_group("tokens").add_argument
    add("--max-new-tokens", type=int, default=128, metavar="N", help="of each text, at most (%(default)s); it also "
        "ends with its end token, and where the model's context ends")
    add("--temperature", type=float, default=0.0, metavar="T", help="divides the logits; 0 takes the likeliest token "
        "(%(default)s)")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest tokens that have this "
        "probability together (%(default)s)")
    add("--seed", type=int, default=1234, metavar="N", help="of the draws (%(default)s)")
    add = parser.add_argument_group("how").add_argument
    add("--kv-cache", default="latent", metavar="KIND", help="latent: MLA's, with absorbed decoding; full: every "
        "head's keys and values, to compare with (%(default)s)")
    add("--speculative", metavar="KIND", help="mtp: the MTP module drafts, the model verifies two tokens at once")
    add("--batch-size", type=int, default=1, metavar="B", help="prompts decoded together (%(default)s)")
    add("--precision", choices=PRECISIONS, help="of weights and activations (default: as trained; auto for Hugging "
        "Face)")
    add("--json", dest="as_json", action="store_true", help="print one JSON object for each text")
    return Request(**vars(parser.parse_args(arguments)))


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status (2 for input that the user can correct)."""
    try:
        request = _parse_arguments(arguments)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return generate(request)


if __name__ == "__main__":
    run_command(main)
