"""The seam between documents and token ids: what preprocessing needs from a tokenizer, and Hugging Face's as the first.

A backend takes a list of texts and returns flat ids and one length per text, so that one which never makes a Python
object per token fits as well as one that does. No torch here: preprocessing starts in a fraction of a second.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dsv3_megatron.data.tokenizer import count_ids, find_eod_id, fingerprint, load_tokenizer


@dataclass(frozen=True)
class EncodedTexts:
    """Ids of several texts, one after the other: `ids_T` int64 [T], `lengths_D` int64 [D] with sum T."""

    ids_T: np.ndarray
    lengths_D: np.ndarray


class Encoder(Protocol):
    """What a tokenizer backend offers; `vocab_size` is the largest id + 1, `eod_id` ends a document."""

    vocab_size: int
    eod_id: int
    fingerprint: str

    def encode_texts(self, texts: Sequence[str]) -> EncodedTexts:
        """Encode each text on its own, with no token added; special tokens written in a text become their ids."""
        ...


class HuggingFaceEncoder:
    """Hugging Face `tokenizers`, whose own threads encode the texts of a batch in parallel.

    No beginning-of-sentence token is added, whatever tokenizer_config.json says (Megatron-LM's HuggingFaceTokenizer
    follows that file).

    Args:
        path: Folder with a tokenizer.json, or the file.
        num_threads: Threads to encode with. The library reads it once per process, at its first batch.

    Raises:
        ValueError: the tokenizer is missing or broken, or num_threads is below 1.
    """

    def __init__(self, path: str | os.PathLike[str], *, num_threads: int = 1) -> None:
        if num_threads < 1:
            raise ValueError(f"workers={num_threads} must be at least 1; try {os.cpu_count()}")
        os.environ["RAYON_NUM_THREADS"] = str(num_threads)
        os.environ["TOKENIZERS_PARALLELISM"] = "true" if num_threads > 1 else "false"
        self._tokenizer = load_tokenizer(path)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.vocab_size = count_ids(self._tokenizer)
        self.eod_id = find_eod_id(self._tokenizer, path)
        self.fingerprint = fingerprint(path)

    def encode_texts(self, texts: Sequence[str]) -> EncodedTexts:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        ids = [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]
        lengths_D = np.array([len(part) for part in ids], dtype=np.int64)
        return EncodedTexts(np.concatenate(ids) if ids else np.empty(0, np.int64), lengths_D)
