"""A model that is alone in its process: its settings, its tokenizer, the memory it needs, and what its calls return."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from dsv3_megatron.config.data import DataConfig
from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.parallel import ParallelConfig
from dsv3_megatron.config.run import RunConfig, section_of
from dsv3_megatron.config.training import CheckpointConfig, LoggingConfig
from dsv3_megatron.generation.text import TextCodec
from dsv3_megatron.metrics.parameters import count_parameters, weight_bytes_per_parameter
from dsv3_megatron.platform import prepare, resolve_precision

# Fields of a run that say how long it is and which steps it takes: here each call is one step, of the rows it is given.
_OF_A_WHOLE_RUN = frozenset({
    "seq_length", "global_batch_size", "train_iters", "phases", "stop_after_phase", "min_lr", "lr_warmup_iters",
    "lr_decay_style", "lr_decay_iters", "eval_interval", "eval_iters", "eval_ema"})
_SECTIONS = ("model", "training", "guards", "fp8")


@dataclass(frozen=True)
class StepResult:
    """What a training step did.

    Attributes:
        iteration: Number of the step, counted from 1.
        loss: Mean loss of the next token before the step, nats.
        mtp_losses: Loss of each MTP depth before its weight, nats: summed over positions that have a target, divided by
            all.
        balance_loss: Balance loss before its weight; None where there is none.
        grad_norm: L2 norm of the gradient before clipping.
        learning_rate: Learning rate that the step was taken with.
        is_applied: Whether the weights were updated; False where the loss or the gradient is not finite.
    """

    iteration: int
    loss: float
    mtp_losses: tuple[float, ...]
    balance_loss: float | None
    grad_norm: float
    learning_rate: float
    is_applied: bool


@dataclass(frozen=True)
class Continuation:
    """What a model went on with; `str()` gives its text, or its ids where there is no tokenizer.

    Attributes:
        token_ids: New tokens, without the prompt's and without the end token.
        text: Text of the new tokens; None without a tokenizer.
        ended: Reason of its end: "end-of-text", "max-new-tokens" or "context".
    """

    token_ids: tuple[int, ...]
    text: str | None
    ended: str

    def __str__(self) -> str:
        return " ".join(map(str, self.token_ids)) if self.text is None else self.text


def settings_alone(run: RunConfig, fields: dict[str, Any], tokenizer: str | Path | None) -> RunConfig:
    """Give a run's settings for a process that is alone and takes its steps one by one.

    Args:
        run: A run, such as a preset.
        fields: Settings to change, by name.
        tokenizer: Folder of a tokenizer; None: the checkpoint's, if the run loads one that carries it.

    Raises:
        ConfigError: an unknown field or one that such a model has no use for, or a value that cannot be.
    """
    for name, value in fields.items():
        section = section_of(name)
        if section not in _SECTIONS:
            raise ConfigError(f"{name}={value!r} is a setting of a run's {section}; a Model has none: leave it out, or "
                              "use dsv3 train")
        if name in _OF_A_WHOLE_RUN:
            raise ConfigError(f"{name}={value!r} plans a whole run; a Model takes its steps one by one, of the rows "
                              "and with the learning_rate that train_step is given: leave it out")
    training = dataclasses.replace(
        run.training, phases=(), stop_after_phase=None, lr_decay_style="constant", lr_warmup_iters=0,
        lr_decay_iters=None, train_iters=1, eval_interval=0, ema_decay=0.0, eval_ema=False, transformer_impl="local")
    run = dataclasses.replace(
        run, parallel=ParallelConfig(), training=training, logging=LoggingConfig(),
        data=DataConfig(tokenizer_model=None if tokenizer is None else str(tokenizer)),
        checkpoint=CheckpointConfig(load=run.checkpoint.load)).override(**fields)
    run = run.override(seq_length=run.model.max_position_embeddings, min_lr=run.training.lr,
                       global_batch_size=run.training.micro_batch_size)
    run.validate(1)
    return run


def open_tokenizer(tokenizer: str | Path | None, vocab_size: int) -> TextCodec | None:
    """Open the tokenizer for a model with fresh weights.

    Raises:
        ValueError: the tokenizer is missing or broken, or has ids that the model does not have.
    """
    if tokenizer is None:
        return None
    codec = TextCodec(tokenizer)
    if codec.num_ids > vocab_size:
        raise ConfigError(f"tokenizer={tokenizer} has ids up to {codec.num_ids - 1}, the model has vocab_size="
                          f"{vocab_size}; give vocab_size={codec.num_ids}, or another tokenizer")
    return codec


def require_memory(run: RunConfig) -> None:
    """Refuse weights that this machine cannot hold, before the system ends the process for them.

    Raises:
        ConfigError: the weights are larger than the memory of the device.
    """
    device = prepare()
    have = torch.cuda.mem_get_info()[1] if device.is_cuda else psutil.virtual_memory().total
    precision = resolve_precision(run.training.precision, device)
    needed = count_parameters(run.model).total * weight_bytes_per_parameter(precision)
    if needed > have:
        raise ConfigError(f"the weights of {run.name} take {needed / 1e9:,.0f} GB in {precision}, and {device.name} "
                          f"has {have / 1e9:,.0f} GB; make it smaller (num_layers={run.model.num_layers}, num_experts="
                          f"{run.model.num_experts}), or use dsv3 train on more devices")
