"""Datasets of made-up documents with the statistics of text, for runs that are to learn something in few steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dsv3_megatron.data.indexed_writer import DatasetWriter


def write_texts(prefix: Path, num_documents: int) -> str:
    """Write documents of 20 to 59 tokens out of 128, of which few are common; the dataset's prefix."""
    generator = np.random.default_rng(0)
    with DatasetWriter(str(prefix), vocab_size=128) as writer:
        lengths = generator.integers(20, 60, size=num_documents)
        writer.add_documents((generator.zipf(1.3, size=int(lengths.sum())) % 128).astype(np.int64), lengths)
    return str(prefix)
