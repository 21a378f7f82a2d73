"""Documents packed into the sequences of a micro-batch: what the modules of a stage need to keep them apart.

Megatron-Core hands its `packed_seq_params` to every layer of a stage and to the MTP modules without looking into it,
where the layers are this library's; `PackedDocuments` travels under that name. Its own packed format, one row of all
tokens, would merge the sequences of a micro-batch, whose balance losses are apart.

Each pipeline stage makes its own from the batch it reads, so nothing of this goes between ranks.

Legend: B sequences, S positions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from dsv3_megatron.config.data import DataConfig
from dsv3_megatron.data.batches import Batch
from dsv3_megatron.model.shared_beginnings import SharedBeginnings
from dsv3_megatron.ops.attention import DocumentBounds
from dsv3_megatron.ops.cross_entropy import IGNORED


@dataclass(frozen=True)
class PackedDocuments:
    """The places where attention stops and where rotary positions restart.

    Attributes:
        bounds: Documents of each sequence that do not see each other (as of `causal_attention`); None: attention
            crosses their ends.
        position_ids_BS: Rotary positions, int64; None: 0 .. S - 1. Restarting them at the bounds changes nothing but
            rounding, since scores depend on distances alone; without bounds it makes tokens of two documents look near.
        shared: Documents that others go on from and see; None: there are none.
    """

    bounds: DocumentBounds | None = None
    position_ids_BS: torch.Tensor | None = None
    shared: SharedBeginnings | None = None

    def starts_BS(self, device: torch.device) -> torch.Tensor:
        """True where a document begins that does not go on from the one before it; with `bounds` only."""
        assert self.bounds is not None
        starts_BS = torch.zeros(len(self.bounds), self.bounds[0][-1], dtype=torch.bool)
        for row, bounds in enumerate(self.bounds):
            continued = self.shared.continued[row] if self.shared is not None else ()
            goes_on = {number for number, before in enumerate(continued) if before == number - 1}
            starts_BS[row, [start for number, start in enumerate(bounds[:-1]) if number not in goes_on]] = True
        return starts_BS.to(device, non_blocking=True)

    def remaining_BS(self, device: torch.device) -> torch.Tensor:
        """How many positions of the same document follow each position, int64; with `bounds` only."""
        assert self.bounds is not None
        rows = [torch.repeat_interleave(torch.tensor(bounds[1:]), torch.tensor(bounds).diff())
                for bounds in self.bounds]
        ends_BS = torch.stack(rows)
        return (ends_BS - 1 - torch.arange(ends_BS.shape[1])).to(device, non_blocking=True)


def packed_documents(batch: Batch, data: DataConfig) -> PackedDocuments | None:
    """Bounds and positions of a micro-batch's documents, if a run's settings keep them apart; None otherwise.

    Args:
        batch: A micro-batch, with `document_bounds` where documents are isolated.
        data: Data configuration of the run.
    """
    if not data.has_document_attention:
        return None
    shared = None
    if batch.continued is not None:
        assert batch.document_bounds is not None
        shared = SharedBeginnings.of(batch.document_bounds, batch.continued, batch.tokens_BS.device)
    return PackedDocuments(batch.document_bounds, batch.position_ids_BS if data.restarts_positions else None, shared)


def with_labels_that_count(batch: Batch, data: DataConfig) -> Batch:
    """The micro-batch with labels that its mask leaves out ignored, where conversations are learnt from.

    The head need not compute their losses, which nothing reads.

    Args:
        batch: A micro-batch.
        data: Data configuration of the run.
    """
    if not data.sft:
        return batch
    return replace(batch, labels_BS=batch.labels_BS.masked_fill(batch.loss_mask_BS == 0, IGNORED))


def forward_stage(stage: torch.nn.Module, batch: Batch, data: DataConfig) -> Any:
    """A micro-batch through one pipeline stage, its documents kept apart as a run's settings say.

    Args:
        stage: A DeepSeekV3Model, wrapped or not; what the stage before it gave has been set as its input.
        batch: A micro-batch on the stage's device, with `document_bounds` where documents are isolated.
        data: Data configuration of the run.

    Returns:
        TokenLosses of the last stage, hidden states of the others.
    """
    return stage(input_ids=batch.tokens_BS, position_ids=batch.position_ids_BS, attention_mask=None,
                 packed_seq_params=packed_documents(batch, data), labels=batch.labels_BS)
