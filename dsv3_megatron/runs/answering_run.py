"""The run of a `SharedModel`: whether a checkpoint can answer under a layout, before anything is allocated."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dsv3_megatron.checkpoint.open import open_checkpoint
from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.parallel import ParallelConfig
from dsv3_megatron.config.pipeline import nearest_microbatches
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.config.training import TrainingConfig
from dsv3_megatron.generation.text import TextCodec, open_codec

if TYPE_CHECKING:
    from dsv3_megatron.runs.shared_model import SharedModel


@dataclass(frozen=True)
class AnsweringRun:
    """A checkpoint whose model can be built.

    Attributes:
        run: The run to build.
        load: Puts the checkpoint into the stages; None: the run's own kind.
        codec: The tokenizer.
        max_length: Most tokens that the model reads.
    """

    run: RunConfig
    load: Callable[[list[Any], Any], None] | None = field(repr=False)
    codec: TextCodec
    max_length: int

    def build(self) -> SharedModel:
        """Build this process's share of the model; called by every process."""
        from dsv3_megatron.runs.shared_model import SharedModel

        return SharedModel.build(self.run, self.load, self.codec, self.max_length)


def check_answering_run(load: str, *, parallel: Mapping[str, Any] | None = None, world_size: int = 1,
                        tokenizer_model: str | None = None, precision: str | None = None,
                        max_length: int | None = None, verify_files: str = "read") -> AnsweringRun:
    """Check a checkpoint, its tokenizer and a layout.

    Args:
        load: Folder of a run's checkpoints, saved under any layout, or of a Hugging Face checkpoint.
        parallel: Fields of ParallelConfig.
        world_size: Number of processes.
        tokenizer_model: Folder of the tokenizer; None: the checkpoint's.
        precision: "auto", "bf16" or "fp32"; None: as the checkpoint was trained.
        max_length: Most tokens that the model reads; None: its context.
        verify_files: How far the checkpoint is compared with its checksums: "read", "all" or "none".

    Raises:
        ValueError: the first thing that is wrong, in one message with the way out.
    """
    checkpoint = open_checkpoint(load, verify_files=verify_files)
    model, layout = checkpoint.model, ParallelConfig(**(parallel or {}))
    model.validate()
    context = model.max_position_embeddings
    if max_length is not None and not 2 <= max_length <= context:
        raise ConfigError(f"max_length={max_length} must lie in 2..{context}, the model's max_position_embeddings")
    codec = open_codec(load, tokenizer_model, vocab_size=model.vocab_size)
    # Nothing runs the stages as training does; a batch is what a run's rules ask for.
    seq_length = math.ceil(context / layout.sequence_multiple) * layout.sequence_multiple
    layout.validate(model, seq_length)
    layout.validate_world_size(world_size)
    stages = layout.pipeline_model_parallel_size
    microbatches = 1 if stages == 1 else nearest_microbatches(layout.schedule, stages, 1)[-1]
    training = TrainingConfig(
        seq_length=seq_length, micro_batch_size=1, train_iters=1,
        global_batch_size=microbatches * layout.data_parallel_size(world_size),
        precision=precision or checkpoint.precision, transformer_impl="local", eval_interval=0)
    training.validate(layout, world_size)
    run = checkpoint.run(load, training, layout, verify_files=verify_files)
    from dsv3_megatron.parallel.layout import stage_layouts

    stage_layouts(run.model, run.parallel)
    return AnsweringRun(run, checkpoint.load, codec, max_length or context)
