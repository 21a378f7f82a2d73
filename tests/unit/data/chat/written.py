"""Datasets of conversations with random ids and masks, written without a tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dsv3_megatron.data.indexed_writer import DatasetWriter


def write_conversations(prefix: str | Path, lengths: list[int], *, vocab_size: int = 48, seed: int = 0,
                        eod_id: int = 1) -> tuple[list[list[int]], list[list[int]]]:
    """Write PREFIX and PREFIX_mask; each conversation has a token that counts behind its first.

    Returns:
        The ids and the masks of each conversation.
    """
    generator = np.random.default_rng(seed)
    ids = [generator.integers(2, vocab_size, size=length) for length in lengths]
    masks = [generator.integers(0, 2, size=length) for length in lengths]
    for mask in masks:
        mask[0], mask[-1] = generator.integers(0, 2), 1
    options = {"level": "conversation", "job": f"{seed}", "eod_id": eod_id}
    for name, values, size, dtype in ((str(prefix), ids, vocab_size, None),
                                      (f"{prefix}_mask", masks, 2, np.dtype(np.uint8))):
        with DatasetWriter(name, vocab_size=size, dtype=dtype, options=options) as writer:
            writer.add_documents(np.concatenate(values), np.array(lengths))
    return [part.tolist() for part in ids], [part.tolist() for part in masks]
