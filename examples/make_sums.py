#!/usr/bin/env python3
"""Write conversations about small sums, for the example of fine-tuning: examples/post_train_dsv3.sh.

    python examples/make_sums.py --number 2000 --seed 1 --output sums.jsonl

Each line is a conversation of one question and its answer. They are the same for the same number and seed.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator

from dsv3_megatron.config.output import json_text
from dsv3_megatron.config.streams import run_command

_LARGEST = 9
_QUESTIONS = ("What is {a} + {b}?", "{a} + {b} = ?", "Add {a} and {b}.")


def conversations(number: int, seed: int) -> Iterator[dict[str, list[dict[str, str]]]]:
    """Yield conversations of a question and its answer, drawn with a seed."""
    draws = random.Random(seed)
    for _ in range(number):
        a, b = draws.randint(0, _LARGEST), draws.randint(0, _LARGEST)
        question = draws.choice(_QUESTIONS).format(a=a, b=b)
        yield {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": str(a + b)}]}


def main(arguments: list[str] | None = None) -> int:
    """Write the file; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=2000, help="conversations (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the draws (%(default)s)")
    parser.add_argument("--output", required=True, metavar="FILE", help="file to write, JSON lines")
    options = parser.parse_args(arguments)
    with open(options.output, "w", encoding="utf-8") as file:
        file.writelines(json_text(conversation) + "\n" for conversation in conversations(options.number, options.seed))
    return 0


if __name__ == "__main__":
    run_command(main)
