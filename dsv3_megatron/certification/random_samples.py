"""Samples that are made up: random tokens, of which some do not count; the same in every process.

Each sequence has another share of tokens that count, so that no two replicas, and no two micro-batches, have the same
number: whoever divides by a number of tokens of its own is seen.

Shapes: B sequences, S positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dsv3_megatron.config.data import DataConfig
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.data.current import CurrentData

EOD = 7
# Share of tokens that end a document, where documents matter.
_END_SHARE = 0.2


class RandomSamples:
    """Sequences of random tokens with random masks.

    Args:
        num_samples: Number of sequences.
        seq_length: Tokens of a sequence.
        vocab_size: Number of token ids.
        data: The run's data settings, of which the document switches and `sft` count; documents, and conversations,
            have 5 tokens on average, each sequence its own.
        mask_BS: Mask of what counts in place of a random one.
        seed: Seed of tokens and masks.

    Attributes:
        tokens: int64 [B, S + 1], the label after the last position with them.
        mask: fp32 [B, S], 1 where the label counts.
        positions: int64 [B, S].
    """

    def __init__(self, num_samples: int, seq_length: int, vocab_size: int, *, data: DataConfig | None = None,
                 mask_BS: torch.Tensor | None = None, seed: int = 0) -> None:
        data = data or DataConfig()
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(0, vocab_size, (num_samples, seq_length + 1), generator=generator)
        self.mask = (torch.rand(num_samples, seq_length, generator=generator)
                     > torch.rand(num_samples, 1, generator=generator) * 0.5).float()
        if mask_BS is not None:
            self.mask = mask_BS
        self.positions = torch.arange(seq_length).repeat(num_samples, 1)
        self._is_chat = data.sft
        if data.has_document_attention or data.eod_mask_loss:
            self.tokens[torch.rand(self.tokens.shape, generator=generator) < _END_SHARE] = EOD
            is_end = self.tokens[:, :-1] == EOD
            if data.eod_mask_loss:
                self.mask[is_end] = 0.0
            if data.restarts_positions:
                starts = torch.nn.functional.pad((self.positions[:, :-1] + 1) * is_end[:, :-1], (1, 0))
                self.positions -= starts.cummax(dim=1).values

    @classmethod
    def of_run(cls, run: RunConfig, num_steps: int, seed: int = 0) -> RandomSamples:
        """Samples for some steps of a run."""
        training = run.training
        return cls(num_steps * training.global_batch_size, training.seq_length, run.model.vocab_size, data=run.data,
                   seed=seed)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        sample = {"tokens": self.tokens[index, :-1], "labels": self.tokens[index, 1:], "loss_mask": self.mask[index],
                  "position_ids": self.positions[index]}
        if self._is_chat:  # conversations say themselves where they end
            (bounds,) = self.document_bounds(range(index, index + 1), is_isolated=True)
            return {**sample, "document_bounds": bounds}
        return sample

    def document_bounds(self, rows: range, *, is_isolated: bool) -> tuple[tuple[int, ...], ...]:
        """Ends of the documents of some sequences; of whole sequences where documents are not kept apart."""
        length = self.tokens.shape[1] - 1
        return tuple((0, *(s for s in range(1, length) if is_isolated and self.tokens[row, s - 1] == EOD), length)
                     for row in rows)


class UnrecordedData(CurrentData):
    """Data whose place a checkpoint does not record: there are no files that a resumed run could compare."""

    def state_dict(self, num_samples: int) -> dict[str, Any]:
        """Give nothing to record; the run's own count of samples says where it goes on."""
        return {}


def unrecorded(samples: RandomSamples) -> UnrecordedData:
    """The samples as what a run reads, from its first step on."""
    return UnrecordedData(samples, None, EOD, {}, 0)
