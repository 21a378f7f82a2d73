"""Let a model learn from its own answers: `dsv3 grpo FLAGS`, or torchrun -m dsv3_megatron grpo FLAGS.

    dsv3 grpo --pretrained-checkpoint runs/chat --tokenizer-model tokenizer/ --prompts sums.jsonl --reward numeric \
        --train-iters 100 --save runs/grpo --load runs/grpo --rollouts runs/grpo-rollouts

It is `dsv3 train` with other defaults. A step's global batch is counted in answers. The objective is that of the
DeepSeek-V3 report, section 5.2.2, whose numbers are not given: these are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dsv3_megatron.commands import train
from dsv3_megatron.commands.sft import begin_with_base
from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.fine_tuning import policy_tuned
from dsv3_megatron.config.load import CommandLine, TrainingRequest, parse_line
from dsv3_megatron.config.run import RunConfig

# Answers of a step.
_GLOBAL_BATCH_SIZE = 64


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one process of a run of GRPO; returns the exit code, as `dsv3 train` does."""
    return train.main(arguments, parse)


def command_line() -> CommandLine:
    """What the command line has beside that of dsv3 train: its help, and the base model's settings."""
    return CommandLine(
        prog="dsv3 grpo", usage="dsv3 grpo --pretrained-checkpoint DIR --tokenizer-model DIR --prompts FILE.jsonl "
        "--reward RULE --rollouts DIR [flags]",
        description="Let a model learn from its own answers to prompts, by what they are worth (GRPO). Architecture, "
        "sequence length and precision are the base model's unless a preset, a file or a flag says otherwise.",
        begin=_begin)


def parse(arguments: Sequence[str]) -> TrainingRequest:
    """Read the command line of a run of GRPO; raises ValueError for what is wrong with it."""
    request, _ = parse_line(arguments, command_line())
    if not request.run.policy.is_on:
        raise ConfigError("prompts is not set: give the prompts to answer, as in --prompts FILE.jsonl")
    return request


def _begin(start: RunConfig | None, fields: Mapping[str, Any]) -> RunConfig:
    return begin_with_base(start, fields, policy_tuned, global_batch_size=_GLOBAL_BATCH_SIZE)
