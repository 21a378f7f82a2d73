"""The encoder as a step of datatrove's pipelines: documents that come through it are written as .bin/.idx.

datatrove reads, filters and deduplicates, on one machine, with Slurm or with Ray; each of its tasks writes one part:

    LocalPipelineExecutor([JsonlReader("corpus"), TokenizeDocuments("data/train", "tokenizer", append_eod=True)],
                          tasks=4, logging_dir="logs/tokens").run()

    dsv3 merge --input data/train_text_document.shard-*.idx --output-prefix data/train_text_document

The parts are those of one job, so `merge` puts them in the order of the tasks, and says which is missing. What it
writes has the bytes of `dsv3 preprocess` on the same texts in the same order.

A part appears when it is whole. A task that was ended in the middle begins its part again when the pipeline is started
once more; datatrove leaves out the tasks that have finished.

Source of the interface: datatrove.pipeline.base (datatrove 0.10). It is imported here, so this module needs the
package.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import batched
from typing import Any

from datatrove.pipeline.base import PipelineStep
from datatrove.utils.word_tokenizers import WordTokenizer

from dsv3_megatron.config.output import json_text
from dsv3_megatron.data.block_encoder import BlockEncoder, EncodedBlock, Transforms
from dsv3_megatron.data.encoder import BACKENDS, choose_encoder
from dsv3_megatron.data.indexed import read_sidecar
from dsv3_megatron.data.indexed_writer import DatasetWriter, publish
from dsv3_megatron.data.job import FOLDER_SUFFIX, Job
from dsv3_megatron.data.reading.documents import DEFAULT_MAX_DOCUMENT_BYTES, RecordReader
from dsv3_megatron.data.reading.inputs import JobShard
from dsv3_megatron.data.tokenizer import fingerprint
from dsv3_megatron.data.transforms.fim import FimOptions, FimTransform, find_fim_sentinels

# Documents that are encoded together, and the characters at which fewer are.
_DOCUMENTS_AT_A_TIME = 1000
_KEY = "text"


class TokenizeDocuments(PipelineStep):
    """Writes the documents that come as token ids, one part for each task, and hands the documents on.

    Args:
        output_prefix: Parts are called {output_prefix}_text_document.shard-I-of-N; a folder that all tasks see.
        tokenizer_model: Folder with a tokenizer.json, or the file.
        append_eod: End every document that has tokens with the tokenizer's end-of-document id.
        add_special_tokens: Put around every text what the tokenizer itself puts there.
        tokenizer_backend: "auto", "gigatoken" or "huggingface", as `dsv3 preprocess` has it.
        fim_rate: Share of documents cut for fill-in-the-middle.
        fim_spm_rate: Share of those in suffix-prefix-middle order.
        fim_sentinels: Tokens for begin, hole and end; None: DeepSeek-V3's.
        seed: Chooses documents and cuts; they depend on it and on the text alone.
        max_document_bytes: UTF-8 bytes of the longest text.
        on_error: "stop" ends the task at a document that cannot be taken; "skip" leaves it out and counts it.

    Raises:
        ValueError: a setting is wrong, or the tokenizer is missing.
    """

    name = "dsv3 tokens"
    type = "TOKENIZER"

    def __init__(
        self,
        output_prefix: str,
        tokenizer_model: str | os.PathLike[str],
        *,
        append_eod: bool = False,
        add_special_tokens: bool = True,
        tokenizer_backend: str = "auto",
        fim_rate: float = 0.0,
        fim_spm_rate: float = 0.0,
        fim_sentinels: Sequence[str] | None = None,
        seed: int = 1234,
        max_document_bytes: int = DEFAULT_MAX_DOCUMENT_BYTES,
        on_error: str = "stop",
    ) -> None:
        super().__init__()
        if tokenizer_backend not in BACKENDS:
            raise ValueError(f"tokenizer_backend={tokenizer_backend!r} must be one of {', '.join(BACKENDS)}")
        if on_error not in ("stop", "skip"):
            raise ValueError(f"on_error={on_error!r} must be stop or skip")
        if max_document_bytes < 1:
            raise ValueError(f"max_document_bytes={max_document_bytes} must be at least 1")
        self.output_prefix, self.tokenizer_model = os.fspath(output_prefix), os.fspath(tokenizer_model)
        self.append_eod, self.add_special_tokens = append_eod, add_special_tokens
        self.tokenizer_backend, self.max_document_bytes = tokenizer_backend, max_document_bytes
        self.on_error = on_error
        self.fim = FimOptions(fim_rate, fim_spm_rate, seed) if fim_rate else None
        self.fim_sentinels = None if fim_sentinels is None else tuple(fim_sentinels)
        # What is wrong with these is found here, not by a thousand tasks.
        fingerprint(self.tokenizer_model)
        self._transforms()

    def part_prefix(self, rank: int, world_size: int) -> str:
        """Path of a task's part, without suffix.

        Args:
            rank: Number of the task, from 0.
            world_size: Tasks in all.
        """
        return f"{self.output_prefix}_{_KEY}_document{JobShard(rank + 1, world_size).suffix}"

    def run(self, data: Iterable[Any] | None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Write a task's part while its documents pass.

        Args:
            data: The task's documents.
            rank: Number of the task, from 0.
            world_size: Tasks in all.

        Raises:
            ValueError: a document cannot be taken and `on_error` is "stop", the part is there from another job, or
                another process is at work on it.
        """
        encoder, _ = choose_encoder(self.tokenizer_model, backend=self.tokenizer_backend)
        transforms, described = self._transforms()
        block_encoder = BlockEncoder(
            RecordReader((), (_KEY,), max_document_bytes=self.max_document_bytes), encoder,
            eod_id=encoder.eod_id if self.append_eod else None, is_stopping=self.on_error == "stop",
            is_wrapped=self.add_special_tokens, transforms=transforms)
        around = (encoder.begin_ids, encoder.end_ids) if self.add_special_tokens else ((), ())
        shard = f"{rank + 1}/{world_size}"
        options = {
            "json_key": _KEY, "level": "document", "append_eod": self.append_eod, "eod_id": encoder.eod_id,
            "begin_ids": list(around[0]), "end_ids": list(around[1]), "read_by": "datatrove", **described}
        identity = {**options, "output_prefix": os.path.basename(self.output_prefix), "tasks": world_size,
                    "tokenizer_fingerprint": encoder.fingerprint, "max_document_bytes": self.max_document_bytes}
        digest = hashlib.sha256(json_text(identity, sort_keys=True).encode("utf-8")).hexdigest()
        options |= {"shard": shard, "job": digest[:16]}
        prefix = self.part_prefix(rank, world_size)
        job = Job(f"{prefix}{FOLDER_SUFFIX}", identity | {"shard": shard}, is_resumed=False, is_overwrite_allowed=True)
        try:
            writer = DatasetWriter(
                prefix, vocab_size=encoder.vocab_size, tokenizer_fingerprint=encoder.fingerprint, options=options,
                is_overwrite_allowed=_is_part_of(prefix, options), folder=job.path)
            try:
                yield from self._write(data or (), block_encoder, writer)
                writer.complete()
            finally:
                writer.close()
            publish(job.path, prefix)
        except BaseException:
            job.close()
            raise
        job.remove()

    def _write(self, data: Iterable[Any], encoder: BlockEncoder, writer: DatasetWriter) -> Iterator[Any]:
        """Encode and append documents, a few at a time, and hand them on."""
        counts = {"records": 0, "documents": 0, "empty": 0, "tokens": 0, "text_bytes": 0, "rejected": {}, "notes": {}}
        for documents in batched(data, _DOCUMENTS_AT_A_TIME):
            with self.track_time(unit="batch"):
                result, pieces = encoder.encode_texts([document.text for document in documents])
                self._refuse(result, documents)
                (key,) = result.keys
                writer.add_encoded(pieces, key.lengths_Q, key.sequences_D, max_token_id=key.max_token_id)
                _count(counts, result)
            self.stat_update("tokens", value=int(key.lengths_Q.sum()), unit="batch")
            for reject in result.reading.rejects:
                self.stat_update(f"left out: {reject.reason}")
            yield from documents
        writer.counts = counts

    def _refuse(self, result: EncodedBlock, documents: Sequence[Any]) -> None:
        if self.on_error == "stop" and result.reading.rejects:
            reject = result.reading.rejects[0]
            document = documents[reject.line - 1]
            raise ValueError(f"document {document.id}: {reject.detail}; {reject.way_out}, or give on_error=\"skip\"")

    def _transforms(self) -> tuple[Transforms, dict[str, Any]]:
        """What happens to documents beside encoding, and what the sidecar says of it."""
        if self.fim is None:
            return Transforms(), {}
        sentinels = find_fim_sentinels(self.tokenizer_model, self.fim_sentinels)
        return Transforms(FimTransform(self.fim, sentinels)), {
            "fim_rate": self.fim.rate, "fim_spm_rate": self.fim.spm_rate, "fim_sentinels": list(sentinels.names),
            "seed": self.fim.seed}


class PlainWords(WordTokenizer):
    """Words as runs of letters and digits: enough for filters and MinHash where spaces part words.

    It is given to datatrove's steps in the place of a language, whose own rules need spaCy or NLTK with its data. It is
    here and not in the script that uses it, so that a task on another machine finds what it needs.
    """

    def word_tokenize(self, text: str) -> list[str]:
        """The words and signs of a text, in order."""
        return re.findall(r"\w+|[^\w\s]", text)

    def sent_tokenize(self, text: str) -> list[str]:
        """The lines of a text that are not empty."""
        return [line.strip() for line in text.splitlines() if line.strip()]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """First and last character of each line."""
        return [match.span() for match in re.finditer(r"[^\n]+", text)]


def _is_part_of(prefix: str, options: dict[str, Any]) -> bool:
    """Whether a part that is there is this task's, from a run that ended before datatrove had noted it."""
    sidecar = read_sidecar(prefix)
    return sidecar is not None and all(sidecar.options.get(name) == options[name] for name in ("job", "shard"))


def _count(counts: dict[str, Any], result: EncodedBlock) -> None:
    """Add what became of some documents to a part's counts."""
    (key,) = result.keys
    counts["records"] += result.num_records
    counts["documents"] += key.sequences_D.size
    counts["empty"] += int((key.sequences_D == 0).sum())
    counts["tokens"] += int(key.lengths_Q.sum())
    counts["text_bytes"] += result.text_bytes
    for reject in result.reading.rejects:
        counts["rejected"][reject.reason] = counts["rejected"].get(reject.reason, 0) + 1
    for note, number in result.reading.notes.items():
        counts["notes"][note] = counts["notes"].get(note, 0) + number
