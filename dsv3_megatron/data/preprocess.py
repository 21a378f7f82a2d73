"""Makes .bin/.idx of text: inputs cut into blocks, encoded by worker processes, written in order by this one.

The coordinator holds no document: it hands out blocks, appends what comes back to the datasets, and notes the position
after each, so that a run which is stopped anywhere goes on from the last block. Nothing appears under the final names
before everything is whole.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from dsv3_megatron.config.output import json_text
from dsv3_megatron.data.block_encoder import BlockEncoder, EncodedBlock, Transforms
from dsv3_megatron.data.chat.masked import CONVERSATIONS, MASK_DTYPE, MASK_VALUES, MASKS
from dsv3_megatron.data.encoder import Encoder, HuggingFaceEncoder
from dsv3_megatron.data.indexed import dataset_paths, read_sidecar
from dsv3_megatron.data.indexed_writer import DatasetWriter, WriterState, publish
from dsv3_megatron.data.job import FOLDER_SUFFIX, Job, job_hash
from dsv3_megatron.data.pool import WorkerDied, WorkerPool
from dsv3_megatron.data.reading.blocks import BLOCK_BYTES, Block, InputPosition, iterate_blocks
from dsv3_megatron.data.reading.documents import DEFAULT_MAX_DOCUMENT_BYTES, LineCounter, RecordReader, describe
from dsv3_megatron.data.reading.inputs import STDIN, InputFile, JobShard, Portion, take_shard
from dsv3_megatron.process.cores import usable_cores

if TYPE_CHECKING:
    from dsv3_megatron.data.chat.template import ChatTemplate

REJECTS_NAME = "rejects.jsonl"


@dataclass(frozen=True)
class PreprocessOptions:
    """The settings of a preprocessing job.

    Args:
        files: Inputs in order (`inputs.expand_inputs`).
        keys: Names of the texts in each record; one dataset each.
        output_prefix: Datasets are called {output_prefix}_{key}_document (or _sentence), as Megatron-LM's.
        is_eod_appended: End every document that has tokens with the tokenizer's end-of-document id.
        is_wrapped: Put around every sequence what the tokenizer itself puts around a text, such as a begin token.
        shard: Part of the job that is done here.
        is_skipping: Leave bad documents out, list them, and go on; else the first one ends the run.
        max_document_bytes: UTF-8 bytes of the longest text.
        is_overwrite_allowed: Replace existing datasets and drop unfinished work.
        is_resumed: Go on with unfinished work, if there is any.
        num_workers: Encoding processes.
        transform_options: What `Transforms` were made from, for the sidecar and to tell jobs apart.
        is_chat: The records are conversations: two datasets are made of them, their tokens and what counts of these.
    """

    files: Sequence[InputFile]
    keys: tuple[str, ...]
    output_prefix: str
    is_eod_appended: bool
    is_wrapped: bool = True
    shard: JobShard = JobShard()
    is_skipping: bool = False
    max_document_bytes: int = DEFAULT_MAX_DOCUMENT_BYTES
    is_overwrite_allowed: bool = False
    is_resumed: bool = False
    num_workers: int = 1
    transform_options: dict[str, Any] = field(default_factory=dict)
    is_chat: bool = False

    def __post_init__(self) -> None:
        if self.num_workers < 1:
            raise ValueError(f"workers={self.num_workers} must be at least 1; try {usable_cores()}")
        if self.max_document_bytes < 1:
            raise ValueError(f"max_document_bytes={self.max_document_bytes} must be at least 1")
        if self.is_chat:
            object.__setattr__(self, "keys", (CONVERSATIONS, MASKS))
            others = [file for file in self.files if file.format in ("text", "parquet")]
            if others:
                raise ValueError(f"{others[0].path} is {others[0].format}: conversations are read from JSON lines "
                                 "(--sft); convert it")
        if not self.keys or len(set(self.keys)) < len(self.keys):
            raise ValueError(f"json_keys={' '.join(self.keys)} must be one or more different keys")
        streams = [file.path for file in self.files if file.is_stream]
        if self.is_resumed and streams:
            what = "standard input" if streams[0] == STDIN else f"the pipe {streams[0]}"
            raise ValueError(f"--resume cannot go on with {what}: what was read is gone; use --overwrite")

    @property
    def level(self) -> str:
        """What a sequence of the datasets is."""
        if self.is_chat:
            return "conversation"
        return "sentence" if self.transform_options.get("split_sentences") else "document"

    def dataset_prefix(self, key: str) -> str:
        """Path of a key's dataset without suffix."""
        return f"{self.output_prefix}_{key}{'' if self.is_chat else f'_{self.level}'}{self.shard.suffix}"

    @property
    def rejects_path(self) -> str:
        """The file that lists documents that were left out, if there are any."""
        return f"{self.output_prefix}{self.shard.suffix}.{REJECTS_NAME}"


@dataclass
class Totals:
    """What became of the input so far. `documents` were written for every key, `empty` of them without tokens in the
    first key's dataset; bytes are of text, UTF-8, all keys together."""

    records: int = 0
    documents: int = 0
    empty: int = 0
    tokens: int = 0
    text_bytes: int = 0
    input_bytes: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)

    @property
    def num_rejected(self) -> int:
        """Number of inputs that were left out."""
        return sum(self.rejected.values())

    def as_counts(self) -> dict[str, Any]:
        """Give the totals as JSON values for the sidecar and the state, in a fixed order."""
        names = [item.name for item in fields(self) if item.name != "input_bytes"]
        counts = {name: getattr(self, name) for name in names}
        return counts | {name: dict(sorted(counts[name].items())) for name in ("rejected", "notes")}

    @classmethod
    def from_counts(cls, counts: dict[str, Any]) -> Totals:
        """Make totals of the values that `as_counts` gave."""
        return cls(**counts | {name: Counter(counts[name]) for name in ("rejected", "notes")})


class InputError(ValueError):
    """A document that cannot be taken; the message says where, why and how to go on."""


def preprocess(
    options: PreprocessOptions,
    encoder: Encoder,
    *,
    transforms: Transforms | None = None,
    template: ChatTemplate | None = None,
    report: Callable[[Totals], None] | None = None,
) -> Totals:
    """Make the datasets of a job, or of a shard of it.

    Args:
        options: The job.
        encoder: The job's tokenizer (`encoder.choose_encoder`).
        transforms: What happens to documents beside encoding; must be what options.transform_options say.
        template: Chat template that renders conversations, with is_chat; None: the records are texts.
        report: Receives the totals after every block.

    Returns:
        The totals.

    Raises:
        InputError: a document that cannot be taken, unless is_skipping.
        ValueError: an output exists or is being written, unfinished work of another job, no document in the input.
        WorkerDied: the system ended a worker.
    """
    portions = take_shard(options.files, options.shard)
    identity = _identity(options, encoder)
    done = _done_before(options, identity)
    if done is not None:
        return done
    job = Job(
        f"{options.output_prefix}{options.shard.suffix}{FOLDER_SUFFIX}",
        identity,
        is_resumed=options.is_resumed,
        is_overwrite_allowed=options.is_overwrite_allowed,
    )
    run = None
    try:
        run = _Run(options, encoder, job, job_hash(identity))
        block_encoder = _block_encoder(options, encoder, transforms, template)
        if not run.is_complete:
            _encode_all(run, block_encoder, portions, report)
        run.finish()
    except BaseException:
        if run is not None:
            run.close()
        job.close()
        raise
    job.remove()
    return run.totals


def _block_encoder(
    options: PreprocessOptions, encoder: Encoder, transforms: Transforms | None, template: ChatTemplate | None
) -> BlockEncoder:
    """What the workers do with a block."""
    assert options.is_chat == (template is not None)
    is_stopping, limit = not options.is_skipping, options.max_document_bytes
    if template is not None:
        from dsv3_megatron.data.chat.encoding import ConversationEncoder, WholeLines

        if not isinstance(encoder, HuggingFaceEncoder):
            raise ValueError(f"tokenizer_backend={encoder.name} does not say where a token lies in its text, which "
                             "conversations need; leave it out")
        reader = RecordReader(options.files, (CONVERSATIONS,), max_document_bytes=limit, parser=WholeLines())
        return ConversationEncoder(reader, encoder, template, is_stopping=is_stopping)
    return BlockEncoder(
        RecordReader(
            options.files,
            options.keys,
            max_document_bytes=limit,
            is_long_split=(transforms or Transforms()).are_off,
        ),
        encoder,
        eod_id=encoder.eod_id if options.is_eod_appended else None,
        is_stopping=is_stopping,
        is_wrapped=options.is_wrapped,
        transforms=transforms,
    )


def _encode_all(
    run: _Run, block_encoder: BlockEncoder, portions: Sequence[Portion], report: Callable[[Totals], None] | None
) -> None:
    """Encode and write what is left of the shard."""
    options, reader = run.options, block_encoder.reader
    with WorkerPool(block_encoder, options.num_workers) as pool:
        blocks = iterate_blocks(
            options.files,
            portions,
            keys=reader.keys,
            position=run.position,
            max_line_bytes=reader.max_line_bytes,
            block_bytes=BLOCK_BYTES,
        )
        for block, result, buffers in pool.map_ordered(block.detach_lines() for block in blocks):
            run.take(block, result, buffers)
            if report is not None:
                report(run.totals)


def _ids_around(options: PreprocessOptions, encoder: Encoder) -> dict[str, list[int]]:
    """The ids that every sequence begins and ends with, by their names in the sidecar."""
    around = (encoder.begin_ids, encoder.end_ids) if options.is_wrapped else ((), ())
    return {"begin_ids": list(around[0]), "end_ids": list(around[1])}


def _identity(options: PreprocessOptions, encoder: Encoder) -> dict[str, Any]:
    """What determines the datasets: everything but how the work is done."""
    return {
        "inputs": [asdict(file) for file in options.files],
        "json_keys": list(options.keys),
        "output_prefix": os.path.basename(options.output_prefix),
        "tokenizer_fingerprint": encoder.fingerprint,
        "append_eod": options.is_eod_appended,
        # Left out where there are none, so that jobs of earlier versions go on.
        **{name: ids for name, ids in _ids_around(options, encoder).items() if ids},
        "shard": f"{options.shard.index}/{options.shard.count}",
        "max_document_bytes": options.max_document_bytes,
        "transforms": options.transform_options,
    }


def _done_before(options: PreprocessOptions, identity: dict[str, Any]) -> Totals | None:
    """The totals of this very job if it is finished and was asked to go on."""
    folder = f"{options.output_prefix}{options.shard.suffix}{FOLDER_SUFFIX}"
    if not options.is_resumed or os.path.exists(os.path.join(folder, "state.json")):
        return None
    sidecars = [read_sidecar(options.dataset_prefix(key)) for key in options.keys]
    wanted = (job_hash(identity), identity["shard"])
    newest_input = max(file.mtime_ns for file in options.files)
    for key, sidecar in zip(options.keys, sidecars, strict=True):
        if sidecar is None or (sidecar.options.get("job"), sidecar.options.get("shard")) != wanted:
            return None
        if os.stat(dataset_paths(options.dataset_prefix(key))[1]).st_mtime_ns < newest_input:
            return None
    assert sidecars[0] is not None
    return Totals.from_counts(sidecars[0].counts)


class _Run:
    """The writing side of a job: datasets, rejects file, totals and position, always of one moment."""

    def __init__(self, options: PreprocessOptions, encoder: Encoder, job: Job, identity_hash: str) -> None:
        self.options, self._job = options, job
        state = job.state or {}
        self.totals = Totals.from_counts(state["totals"]) if state else Totals()
        self.position = InputPosition(**state["position"]) if state else InputPosition()
        self._lines = LineCounter(options.files, *(state["lines"] if state else ()))
        self.is_complete = bool(state.get("is_complete"))
        self._writers: list[DatasetWriter] = []
        self._rejects = open(os.path.join(job.path, REJECTS_NAME), "a+b")
        self._rejects.truncate(state.get("rejects_bytes", 0))
        self._rejects.seek(0)
        self._rejects_hash = hashlib.file_digest(self._rejects, "sha256")
        if state and self._rejects_hash.hexdigest() != state["rejects_sha256"]:
            self._rejects.close()
            raise ValueError(f"{self._rejects.name} is not what was written: start over with --overwrite (without "
                             "--resume)")
        if self.is_complete:
            return
        try:
            self._open_writers(encoder, identity_hash, state)
        except BaseException:
            self.close()
            raise

    def _open_writers(self, encoder: Encoder, identity_hash: str, state: dict[str, Any]) -> None:
        options = self.options
        for index, key in enumerate(options.keys):
            self._writers.append(
                DatasetWriter(
                    options.dataset_prefix(key),
                    vocab_size=MASK_VALUES if key == MASKS else encoder.vocab_size,
                    dtype=MASK_DTYPE if key == MASKS else None,
                    tokenizer_fingerprint=encoder.fingerprint,
                    options={
                        "json_key": key,
                        "level": options.level,
                        "append_eod": options.is_eod_appended,
                        "eod_id": encoder.eod_id,
                        **_ids_around(options, encoder),
                        "inputs": [os.path.basename(file.path) for file in options.files],
                        "shard": f"{options.shard.index}/{options.shard.count}",
                        "job": identity_hash,
                        **options.transform_options,
                    },
                    is_overwrite_allowed=options.is_overwrite_allowed,
                    folder=self._job.path,
                    state=WriterState(**state["writers"][index]) if state else None,
                )
            )

    def take(self, block: Block, result: EncodedBlock, buffers: list[bytes]) -> None:
        """Write a block's documents and move on behind it.

        Raises:
            InputError: the block has a reject and the run stops at it; the block is left out.
        """
        for reject in result.reading.rejects:
            path, placed = self._lines.place(block, reject)
            message = describe(path, self.options.files[block.file].format, placed)
            if not self.options.is_skipping:
                raise InputError(f"{message}, or leave such documents out with --on-error skip")
            row = {"file": path, "line": placed.line, "byte": placed.byte, "reason": placed.reason, "message": message}
            written = json_text(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
            self._rejects.write(written)
            self._rejects_hash.update(written)
            self.totals.rejected[placed.reason] += 1
        start = 0
        for key, writer, encoded in zip(self.options.keys, self._writers, result.keys, strict=True):
            stop = start + encoded.num_pieces
            writer.add_encoded(
                buffers[start:stop], encoded.lengths_Q, encoded.sequences_D, max_token_id=encoded.max_token_id
            )
            self.totals.tokens += 0 if key == MASKS else int(encoded.lengths_Q.sum(dtype="int64"))
            start = stop
        totals, first = self.totals, result.keys[0]
        totals.records += result.num_records
        totals.documents += first.sequences_D.size
        totals.empty += int((first.sequences_D == 0).sum())
        totals.text_bytes += result.text_bytes
        totals.input_bytes = block.input_bytes
        totals.notes.update(result.reading.notes)
        self._lines.pass_block(block, result.reading.num_lines)
        self.position = block.next
        self._save()

    def finish(self) -> None:
        """Complete the datasets and put them in place.

        Raises:
            ValueError: there is no document in the whole job's input.
        """
        options = self.options
        if not self.is_complete:
            if not self.totals.documents and options.shard.count == 1:
                names = ", ".join(file.path for file in options.files)
                left_out = f" ({self.totals.num_rejected} left out)" if self.totals.num_rejected else ""
                self._job.state = None  # nothing to go on with
                raise ValueError(
                    f"no documents in {names}{left_out}: give JSON lines, Parquet or text files with a text"
                )
            for writer in self._writers:
                writer.counts = self.totals.as_counts()
                writer.complete()
            self.is_complete = True
            self._save()
        self.close()
        for key in options.keys:
            publish(self._job.path, options.dataset_prefix(key))
        rejects = os.path.join(self._job.path, REJECTS_NAME)
        if os.path.exists(rejects) and os.path.getsize(rejects):
            os.replace(rejects, options.rejects_path)

    def close(self) -> None:
        """Close the files that are open."""
        for writer in self._writers:
            writer.close()
        self._rejects.close()

    def _save(self) -> None:
        self._rejects.flush()
        is_open = not self.is_complete
        self._job.save(
            {
                "position": asdict(self.position),
                "lines": [self._lines.file, self._lines.num_lines],
                "totals": self.totals.as_counts(),
                "writers": [asdict(writer.state()) for writer in self._writers] if is_open else [],
                "rejects_bytes": self._rejects.tell(),
                "rejects_sha256": self._rejects_hash.hexdigest(),
                "is_complete": self.is_complete,
            }
        )


__all__ = ["InputError", "PreprocessOptions", "Totals", "WorkerDied", "preprocess"]
