"""A multi-token prediction module that keeps packed documents apart.

At depth k, position i reads the hidden state of position i and the embedding of token i + k. Near the end of a sequence
there is no such token: Megatron-Core puts token 0 in its place, and the loss does not count the position. An isolated
document ends like a sequence, so that its last k positions read token 0, not the tokens of the next document. Those
positions are the only ones to read it, and no earlier position sees them.

Legend: B sequences, S positions.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer

from dsv3_megatron.model.packed_documents import PackedDocuments


class DocumentMTPLayer(MultiTokenPredictionLayer):
    """Megatron-Core's MTP module; its tokens move left within their document. Source: DeepSeek-V3 report, eq. 21-22."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Ids are of the whole sequence also where ranks share it: none is to be fetched from another rank.
        self.cp_group = None

    def _get_embeddings(self, input_ids: torch.Tensor, *args: Any, packed_seq_params: PackedDocuments | None = None,
                        **kwargs: Any) -> Any:
        """Move the tokens one position left and embed them.

        Args:
            input_ids: int64 [B, S], what depth k - 1 read; the token that a document begins with would move into the
                document before it, and becomes token 0.
            packed_seq_params: The documents, where they are isolated. Not handed on: Megatron-Core would take
                them for its own.
        """
        if packed_seq_params is not None and packed_seq_params.bounds is not None:
            input_ids = input_ids.masked_fill(packed_seq_params.starts_BS(input_ids.device), 0)
        return super()._get_embeddings(input_ids, *args, packed_seq_params=None, **kwargs)
