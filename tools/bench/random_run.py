"""The trainer on random tokens: what benchmarks of a training step measure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dsv3_megatron.config.run import RunConfig

if TYPE_CHECKING:
    from dsv3_megatron.runs.trainer import Trainer


class RandomTokens:
    """A dataset without end; sample i is the same whenever it is read."""

    def __init__(self, vocab_size: int, seq_length: int) -> None:
        self.vocab_size = vocab_size
        self.seq_length = seq_length

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(0, self.vocab_size, (self.seq_length + 1,), generator=generator)
        return {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "loss_mask": torch.ones(self.seq_length),
            "position_ids": torch.arange(self.seq_length),
        }


def random_token_trainer(run: RunConfig) -> Trainer:
    """A trainer of `run` that reads random tokens, this process's part; `train_step` is the trainer's own."""
    from dsv3_megatron.runs.rank import prepare_rank

    prepare_rank()  # before anything imports Megatron-Core
    from dsv3_megatron.data.current import CurrentData
    from dsv3_megatron.parallel.groups import world_size_from_environment
    from dsv3_megatron.runs.trainer import Trainer

    run.validate(world_size_from_environment())
    tokens = RandomTokens(run.model.vocab_size, run.training.seq_length)
    return Trainer(run, data=CurrentData(tokens, None, None, {}, 0))
