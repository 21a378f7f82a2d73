#!/usr/bin/env python3
"""Write conversations about small sums, or prompts of such, for the example of post-training: post_train_dsv3.sh.

    python examples/make_sums.py --number 2000 --seed 1 --output sums.jsonl
    python examples/make_sums.py --number 500 --prompts --output prompts.jsonl
    python examples/make_sums.py --number 160 --prompts --held-out --output held-out.jsonl

Each line is a conversation of one question and its answer, or a question with its answer for a reward. In a quarter of
the conversations the answer is in a box, \\boxed{13}, so that a model learns both ways and takes the other by itself: a
reward for boxes then has something to teach. Lines are the same for the same number and seed. Every fifth question is
held out: the first two commands never write it, the third writes each of them at most once.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import random
from collections.abc import Iterator
from typing import Any

from dsv3_megatron.config.output import json_text
from dsv3_megatron.config.streams import run_command

_LARGEST = 9
_QUESTIONS = ("What is {a} + {b}?", "{a} + {b} = ?", "Add {a} and {b}.", "How much is {a} + {b}?", "{a} plus {b}?",
              "What is {a} plus {b}?", "Give the sum of {a} and {b}.", "{a} and {b} together?")
_HELD_OUT_ONE_OF = 5
_BOXED_SHARE = 0.25


def questions(*, is_held_out: bool) -> list[tuple[str, str]]:
    """The questions that are held out, or all others, each with its answer."""
    numbers = range(_LARGEST + 1)
    every = [(form.format(a=a, b=b), str(a + b)) for form, a, b in itertools.product(_QUESTIONS, numbers, numbers)]
    random.Random(0).shuffle(every)
    return [each for place, each in enumerate(every) if (place % _HELD_OUT_ONE_OF == 0) == is_held_out]


def lines(number: int, seed: int, *, prompts: bool = False, is_held_out: bool = False,
          boxed_share: float = _BOXED_SHARE) -> Iterator[dict[str, Any]]:
    """Yield conversations, or prompts with their answers, drawn with a seed."""
    draws, known = random.Random(seed), questions(is_held_out=is_held_out)
    drawn = draws.sample(known, min(number, len(known))) if is_held_out else draws.choices(known, k=number)
    for question, answer in drawn:
        if prompts:
            yield {"prompt": question, "answer": answer}
        else:
            said = f"\\boxed{{{answer}}}" if draws.random() < boxed_share else answer
            yield {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": said}]}


def _share(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} must be a number from 0 to 1")


def main(arguments: list[str] | None = None) -> int:
    """Write the file; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=2000, help="lines (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the draws (%(default)s)")
    parser.add_argument("--prompts", action="store_true", help="write questions with their answers, not conversations")
    parser.add_argument("--held-out", action="store_true", help="write questions that are written without it never")
    parser.add_argument("--boxed", type=_share, default=_BOXED_SHARE, metavar="SHARE",
                        help="share of conversations with the answer in a box, 0 to 1 (%(default)s)")
    parser.add_argument("--output", required=True, metavar="FILE", help="file to write, JSON lines")
    options = parser.parse_args(arguments)
    with open(options.output, "w", encoding="utf-8") as file:
        file.writelines(json_text(line) + "\n" for line in lines(
            options.number, options.seed, prompts=options.prompts, is_held_out=options.held_out,
            boxed_share=options.boxed))
    return 0


if __name__ == "__main__":
    run_command(main)
