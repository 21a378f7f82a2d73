"""The data of a rehearsal: samples that are made up, each from its number, with documents that end now and then."""

from __future__ import annotations

from typing import Any

import torch

from dsv3_megatron.config.recipe import PlannedPhase
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.data.current import CurrentData

_NUM_SAMPLES = 1 << 40
# A document ends after so many tokens, where documents are kept apart.
_DOCUMENT = 700


class MadeSamples:
    """Samples that are made up, without end.

    Args:
        seq_length: Tokens of a sample.
        vocab_size: Number of token ids; the last one ends a document.
    """

    def __init__(self, seq_length: int, vocab_size: int) -> None:
        self.seq_length, self.vocab_size = seq_length, vocab_size

    def __len__(self) -> int:
        return _NUM_SAMPLES

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Sample `index`: tokens, labels and position ids int64 [S], loss mask float32 [S]."""
        ids = (torch.arange(self.seq_length + 1) + index) % (self.vocab_size - 1)
        ids[(_DOCUMENT + index % _DOCUMENT)::_DOCUMENT] = self.vocab_size - 1
        return {"tokens": ids[:-1], "labels": ids[1:], "loss_mask": torch.ones(self.seq_length),
                "position_ids": torch.arange(self.seq_length)}


def make_current_data(run: RunConfig, phase: PlannedPhase, first_sample: int) -> CurrentData:
    """What `data/current.py::open_current_data` gives, without files."""
    samples: Any = MadeSamples(phase.training.seq_length, run.model.vocab_size)
    return CurrentData(samples, None, run.model.vocab_size - 1, {"made": True}, first_sample)
