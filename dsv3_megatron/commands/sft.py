"""Fine-tune a model on conversations: `dsv3 sft FLAGS`, or several processes by torchrun -m dsv3_megatron sft FLAGS.

    dsv3 sft --pretrained-checkpoint runs/quickstart/checkpoints --data-path data/chat_conversations \
        --tokenizer-model tokenizer/ --save runs/chat --load runs/chat

It is `dsv3 train` with other defaults. The architecture is the base model's. The data are what dsv3 preprocess --sft
made. The run goes over them twice, at a learning rate that falls by a cosine from 5e-6 to 1e-6 (DeepSeek-V3 report,
section 5.1). What the report does not say is as it was before it: routers' biases stay, no balance loss is added.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dsv3_megatron.commands import train
from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.fine_tuning import EPOCHS, fine_tuned
from dsv3_megatron.config.load import CommandLine, TrainingRequest, parse_line
from dsv3_megatron.config.presets import preset
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.config.values import read_value

_MOST_EPOCHS = 1000
# Sequences of a step, of a base model whose batch is not to be taken over.
_GLOBAL_BATCH_SIZE = 8


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one process of a fine-tuning; returns the exit code, as `dsv3 train` does."""
    return train.main(arguments, parse)


def command_line() -> CommandLine:
    """What the command line has beside that of dsv3 train: its help, --epochs, and the base model's settings."""
    return CommandLine(
        prog="dsv3 sft", usage="dsv3 sft --pretrained-checkpoint DIR --data-path PREFIX [flags]",
        description="Fine-tune a model on conversations (dsv3 preprocess --sft). Architecture, sequence length and "
        "precision are the base model's unless a preset, a file or a flag says otherwise.",
        begin=_begin, add_flags=_add_flags)


def begin_with_base(start: RunConfig | None, fields: Mapping[str, Any], tuned: Callable[[RunConfig], RunConfig], *,
                    global_batch_size: int) -> RunConfig:
    """The run that flags of a fine-tuning change: of what they start from, or one of the base model's architecture.

    Args:
        start: The preset, or the run of a model's folder, that they name; None where they name none.
        fields: Fields that flags and file give; `pretrained_checkpoint` among them names the base model.
        tuned: Gives a run the settings of the fine-tuning.
        global_batch_size: Sequences, or answers, of a step, where the architecture is the base model's.

    Raises:
        ValueError: the base model cannot be opened.
    """
    base = fields.get("pretrained_checkpoint")
    if start is not None or base is None:
        return tuned(start or preset("tiny"))
    from dsv3_megatron.checkpoint.open import errors_of_base, open_checkpoint

    with errors_of_base(base):
        opened = open_checkpoint(base)
    run = tuned(opened.run(base, preset("tiny").training))
    known = {field: value for field, value in opened.training.items() if field in ("micro_batch_size", "precision")}
    length = min(opened.seq_length, opened.model.max_position_embeddings)
    return run.override(load=None, seq_length=length, global_batch_size=global_batch_size, **known)


def parse(arguments: Sequence[str]) -> TrainingRequest:
    """Read the command line of a fine-tuning; raises ValueError for what is wrong with it."""
    request, given = parse_line(arguments, command_line())
    if not request.run.data.sft:
        raise ConfigError("sft=False: dsv3 sft trains on conversations; use dsv3 train for texts")
    if request.run.training.phases or "train_iters" in given:
        if given["epochs"] is not None:
            other = "phases say" if request.run.training.phases else "train_iters says"
            raise ConfigError(f"epochs={given['epochs']:g}: {other} how long the run is; leave one out")
        return request
    epochs = EPOCHS if given["epochs"] is None else given["epochs"]
    if not 0 < epochs <= _MOST_EPOCHS:
        raise ConfigError(f"epochs={epochs:g} must be greater than 0, and at most {_MOST_EPOCHS}")
    run = request.run.override(train_iters=_steps_of(request.run, epochs))
    return dataclasses.replace(request, run=run)


def _add_flags(parser: argparse.ArgumentParser) -> None:
    def number(word: str) -> float:
        return float(read_value("epochs", word, "float"))

    parser.add_argument_group("fine-tuning").add_argument(
        "--epochs", type=number, metavar="X", help=f"times to go over the training data (default: {EPOCHS:g}); "
        "rounded up to whole steps. --train-iters says it in steps instead")


def _begin(start: RunConfig | None, fields: Mapping[str, Any]) -> RunConfig:
    return begin_with_base(start, fields, fine_tuned, global_batch_size=_GLOBAL_BATCH_SIZE)


def _steps_of(run: RunConfig, epochs: float) -> int:
    """Steps in which every sample of the training data is taken so many times.

    Raises:
        ValueError: the data are missing, or cannot be used.
    """
    from dsv3_megatron.data.datasets import dataset_config, open_conversations, parse_split

    if not run.data.data_path:
        return run.training.train_iters  # it is said later that there are none
    config = dataset_config(run)
    blend, share = config.train_blend, 1.0
    if blend is None:
        blend, share = config.blend, parse_split(config.split)[0]
    assert blend is not None
    num_samples = open_conversations(config, blend, (0.0, share))[1]
    return max(1, math.ceil(epochs * num_samples / run.training.global_batch_size))
