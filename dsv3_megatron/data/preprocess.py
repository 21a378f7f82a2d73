"""From JSON Lines to .bin/.idx: reader, encoder and writer put together, for tools/preprocess_data.py and tests.

Documents are encoded in batches of about a few megabytes of text. While one batch is being encoded (which holds no
interpreter lock) the one before is written and the next one read.
"""

from __future__ import annotations

import glob
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from dsv3_megatron.data.corpus import Document, JsonlReader
from dsv3_megatron.data.encoder import EncodedTexts, Encoder
from dsv3_megatron.data.indexed import DatasetWriter

_BATCH_CHARACTERS = 2_000_000
_BATCH_DOCUMENTS = 4096


@dataclass(frozen=True)
class Progress:
    """Where a run stands. `text_bytes` are UTF-8 bytes of text, without the JSON around it."""

    num_documents: int
    num_empty_documents: int
    num_blank_lines: int
    num_tokens: int
    text_bytes: int
    seconds: float

    def __str__(self) -> str:
        rate = self.text_bytes / 1e6 / max(self.seconds, 1e-9)
        return (
            f"{self.num_documents} documents, {self.text_bytes / 1e6:.1f} MB, {self.num_tokens} tokens, "
            f"{self.text_bytes / max(self.num_tokens, 1):.2f} bytes/token, {rate:.1f} MB/s"
        )


def expand_inputs(patterns: Sequence[str]) -> list[str]:
    """Files named by paths and globs, in the order given; a glob's matches are sorted.

    Raises:
        ValueError: a pattern matches no file.
    """
    paths: list[str] = []
    for pattern in patterns:
        matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not matches:
            what = "matches no file" if glob.has_magic(pattern) else "does not exist"
            raise ValueError(f"input {pattern} {what}: give JSON Lines files or globs")
        paths.extend(path for path in matches if path not in paths)
    return paths


def _batch_documents(documents: Iterable[Document]) -> Iterator[list[str]]:
    texts: list[str] = []
    num_characters = 0
    for document in documents:
        texts.append(document.text)
        num_characters += len(document.text)
        if num_characters >= _BATCH_CHARACTERS or len(texts) >= _BATCH_DOCUMENTS:
            yield texts
            texts, num_characters = [], 0
    if texts:
        yield texts


def _encode_ahead(batches: Iterable[list[str]], encoder: Encoder) -> Iterator[tuple[int, EncodedTexts]]:
    """Yield (UTF-8 bytes, ids) of each batch in order, with the next batch already being encoded."""

    def encode(texts: list[str]) -> tuple[int, EncodedTexts]:
        return sum(len(text.encode("utf-8")) for text in texts), encoder.encode_texts(texts)

    with ThreadPoolExecutor(max_workers=1) as executor:
        pending: Future[tuple[int, EncodedTexts]] | None = None
        for texts in batches:
            submitted = executor.submit(encode, texts)
            if pending is not None:
                yield pending.result()
            pending = submitted
        if pending is not None:
            yield pending.result()


def append_to_documents(encoded: EncodedTexts, token_id: int) -> EncodedTexts:
    """Put one token after each document that has tokens; a document without any stays empty, as in Megatron-LM."""
    ends_D = np.cumsum(encoded.lengths_D)
    has_tokens_D = encoded.lengths_D > 0
    ids_T = np.insert(encoded.ids_T, ends_D[has_tokens_D], token_id)
    return EncodedTexts(ids_T, encoded.lengths_D + has_tokens_D)


def preprocess_files(
    paths: Sequence[str],
    *,
    output_prefix: str,
    json_key: str,
    encoder: Encoder,
    is_eod_appended: bool,
    is_overwrite_allowed: bool = False,
    log_interval: int = 1000,
    report: Callable[[Progress], None] | None = None,
) -> Progress:
    """Encode the texts of JSON Lines files into the dataset OUTPUT_PREFIX_{json_key}_document.

    Args:
        paths: Files, read in this order.
        output_prefix: As Megatron-LM's --output-prefix.
        json_key: Key of the text.
        encoder: The tokenizer backend.
        is_eod_appended: End every document that has tokens with the encoder's eod_id.
        is_overwrite_allowed: Replace an existing dataset.
        log_interval: Call `report` about every this many documents (at batch ends).
        report: Receives the progress so far.

    Returns:
        The totals.

    Raises:
        ValueError: bad input (file, line and byte in the message), no document in it, or the output exists. Nothing
            is left under the output's names.
    """
    start = time.perf_counter()
    readers = [JsonlReader(path, json_key) for path in paths]
    num_empty = text_bytes = num_reports = 0
    options = {
        "json_key": json_key,
        "append_eod": is_eod_appended,
        "eod_id": encoder.eod_id,
        "inputs": [os.path.basename(path) for path in paths],
    }
    with DatasetWriter(
        f"{output_prefix}_{json_key}_document",
        vocab_size=encoder.vocab_size,
        tokenizer_fingerprint=encoder.fingerprint,
        options=options,
        is_overwrite_allowed=is_overwrite_allowed,
    ) as writer:

        def progress() -> Progress:
            num_blank_lines = sum(reader.num_blank_lines for reader in readers)
            seconds = time.perf_counter() - start
            return Progress(writer.num_documents, num_empty, num_blank_lines, writer.num_tokens, text_bytes, seconds)

        documents = (document for reader in readers for document in reader)
        for num_bytes, encoded in _encode_ahead(_batch_documents(documents), encoder):
            text_bytes += num_bytes
            num_empty += int((encoded.lengths_D == 0).sum())
            if is_eod_appended:
                encoded = append_to_documents(encoded, encoder.eod_id)
            writer.add_documents(encoded.ids_T, encoded.lengths_D)
            if report is not None and writer.num_documents // log_interval > num_reports:
                num_reports = writer.num_documents // log_interval
                report(progress())
        if not writer.num_documents:
            names = ", ".join(paths)
            raise ValueError(f"no documents in {names}: the input is empty; give JSON Lines with a text each")
    return progress()
