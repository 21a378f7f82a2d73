"""Datasets that the tests write."""

from pathlib import Path

import numpy as np

from dsv3_megatron.data.indexed import dataset_paths
from dsv3_megatron.data.indexed_writer import DatasetWriter


def write(prefix, vocab_size, documents, batch=100, **keywords):
    with DatasetWriter(prefix, vocab_size=vocab_size, **keywords) as writer:
        for start in range(0, len(documents), batch):
            part = documents[start : start + batch]
            ids = np.array([token for document in part for token in document], dtype=np.int64)
            writer.add_documents(ids, np.array([len(document) for document in part]))


def read_pair(prefix):
    return [Path(path).read_bytes() for path in dataset_paths(prefix)[:2]]


def damage(path, change):
    path.write_bytes(change(path.read_bytes()))
