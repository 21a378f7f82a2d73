"""A block of input to a block of tokens: what the worker processes of preprocessing do.

A block's result depends on the block alone, so that any number of workers, shards and restarts gives the same dataset.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dsv3_megatron.data.encoder import Encoder, EncodingError
from dsv3_megatron.data.indexed import choose_dtype
from dsv3_megatron.data.reading.blocks import Block
from dsv3_megatron.data.reading.documents import Reading, Record, RecordReader, Text, too_large
from dsv3_megatron.data.reading.json_lines import RecordError
from dsv3_megatron.data.transforms.combined_tokens import CombinedTokenSplitter
from dsv3_megatron.data.transforms.fim import FimTransform
from dsv3_megatron.data.transforms.sentences import SentenceSplitter

_FLUSH_TOKENS = 1 << 20

# The sequences of one text, each in pieces of ids.
EncodedText = list[list[np.ndarray]]


@dataclass(frozen=True)
class Transforms:
    """What happens to a document beside encoding; None of each is off."""

    fim: FimTransform | None = None
    combined: CombinedTokenSplitter | None = None
    sentences: SentenceSplitter | None = None

    @property
    def are_off(self) -> bool:
        """Whether a document's ids are those of its text, nothing else."""
        return self.fim is None and self.combined is None and self.sentences is None


@dataclass
class EncodedKey:
    """A block's documents for one key: int32 tokens of each sequence [Q], int32 sequences of each document [D]."""

    lengths_Q: np.ndarray
    sequences_D: np.ndarray
    num_pieces: int
    max_token_id: int


@dataclass
class EncodedBlock:
    """A block's result without the ids, which travel beside it as `num_pieces` buffers for each key.

    `num_records` are all that were read, rejected ones included; `reading` has what was unusual, the rejects with their
    byte in the file; `text_bytes` are UTF-8, all keys together.
    """

    keys: list[EncodedKey]
    reading: Reading
    num_records: int
    text_bytes: int


class BlockEncoder:
    """Encodes blocks; made once, before the workers are forked.

    Args:
        reader: Reader of the blocks.
        encoder: The tokenizer.
        eod_id: Ends every document that has tokens; None adds nothing.
        is_wrapped: Put the tokenizer's own begin and end ids around every sequence, as Megatron-LM's tool does.
        is_stopping: Stop a block at its first reject.
        transforms: What is done to documents beside encoding them; None: nothing.
    """

    def __init__(
        self,
        reader: RecordReader,
        encoder: Encoder,
        *,
        eod_id: int | None,
        is_stopping: bool,
        is_wrapped: bool = True,
        transforms: Transforms | None = None,
    ) -> None:
        self.reader, self.encoder = reader, encoder
        self.is_stopping = is_stopping
        self.transforms = transforms or Transforms()
        self.dtype = choose_dtype(encoder.vocab_size)
        self._eod = None if eod_id is None else np.array([eod_id], dtype=np.uint32)
        self._begin_T = np.array(encoder.begin_ids if is_wrapped else (), dtype=np.uint32)
        self._end_T = np.array(encoder.end_ids if is_wrapped else (), dtype=np.uint32)

    def __call__(self, block: Block, lines: bytes | bytearray | None) -> tuple[EncodedBlock, list[bytes]]:
        """The result, and the ids' bytes: all pieces of the first key, then those of the second, and so on.

        `lines` are the block's, from `Block.detach_lines`.
        """
        block = block.attach_lines(lines)
        try:
            result = self._encode(block, is_checked=False)
        except _WrongId:  # rare: once more, to find the document
            result = self._encode(block, is_checked=True)
        self.encoder.limit_memory()
        return result

    def _encode(self, block: Block, *, is_checked: bool) -> tuple[EncodedBlock, list[bytes]]:
        reading = Reading()
        return self._encode_records(self.reader.read(block, reading), reading, is_checked=is_checked)

    def _encode_records(self, records: Iterable[Record], reading: Reading, *, is_checked: bool
                        ) -> tuple[EncodedBlock, list[bytes]]:
        rejects = []
        output = self._outputs(is_checked=is_checked)
        num_records = text_bytes = 0
        for record in records:
            num_records += 1
            try:
                encoded = self._encode_record(record, output, reading)
            except (RecordError, EncodingError) as problem:
                error = problem if isinstance(problem, RecordError) else _not_encoded(problem)
                rejects.append(replace(error.reject, byte=record.byte + error.reject.byte, line=record.line))
                if self.is_stopping:
                    break
                continue
            for out, sequences in zip(output, encoded, strict=True):
                out.add(sequences)
            text_bytes += sum(text.num_bytes for text in record.texts)
        reading.rejects = sorted([*rejects, *reading.rejects], key=lambda reject: (reject.line, reject.byte))
        for out in output:
            out.flush()
        keys = [out.result() for out in output]
        return EncodedBlock(keys, reading, num_records, text_bytes), [piece for out in output for piece in out.pieces]

    def encode_texts(self, texts: Sequence[str]) -> tuple[EncodedBlock, list[bytes]]:
        """The result of texts that another program has read, for one dataset; a reject's `line` is its number from 1.

        Their bytes are those that a block of the same texts gives.
        """
        records = [Record([_text_of(text)], 0, number) for number, text in enumerate(texts, start=1)]
        try:
            result = self._encode_records(records, Reading(), is_checked=False)
        except _WrongId:
            result = self._encode_records(records, Reading(), is_checked=True)
        self.encoder.limit_memory()
        return result

    def _outputs(self, *, is_checked: bool) -> list[TokenOutput]:
        """One for each dataset that records go into."""
        return [TokenOutput(self.dtype, self.encoder.vocab_size, is_checked) for _ in self.reader.keys]

    def _encode_record(self, record: Record, output: list[TokenOutput], reading: Reading) -> list[EncodedText]:
        """What a record gives each output.

        Raises:
            RecordError: the record cannot be taken.
        """
        return [self._encode_text(text, out, reading) for text, out in zip(record.texts, output, strict=True)]

    def _encode_text(self, text: Text, out: TokenOutput, reading: Reading) -> EncodedText:
        """The sequences of a text, each a list of arrays of ids.

        Raises:
            RecordError: the text cannot be taken.
        """
        limit = self.reader.max_document_bytes
        if text.error is not None:
            raise text.error
        if text.text is None:
            data = text.gather(limit)
            if data is None:
                raise too_large(f"more than {limit}", limit)
            # Piece by piece into the dataset's dtype: a long text's ids would take four times its share of memory.
            sequences = [[out.narrow(ids_T) for ids_T in self.encoder.encode_pieces(data)]]
        else:
            if 4 * len(text.text) > limit and text.num_bytes > limit:
                raise too_large(text.num_bytes, limit)
            sequences = self._encode_whole(text.text, reading)
        if self._begin_T.size or self._end_T.size:
            sequences = [[self._begin_T, *arrays, self._end_T] for arrays in sequences]
        sequences = [arrays for arrays in sequences if any(ids_T.size for ids_T in arrays)]
        if sequences and self._eod is not None:
            sequences[-1].append(self._eod)
        if out.is_checked:
            for arrays in sequences:
                for ids_T in arrays:
                    out.narrow(ids_T)
        return sequences

    def _encode_whole(self, text: str, reading: Reading) -> list[list[np.ndarray]]:
        encode, transforms = self.encoder.encode_pieces, self.transforms
        if transforms.are_off:
            return [list(encode(text))]
        if transforms.sentences is not None:
            return [list(encode(sentence)) for sentence in transforms.sentences.split(text)]
        if transforms.fim is None:
            arrays = list(encode(text))
        else:
            arrays = []
            form, parts = transforms.fim(text)
            reading.notes[f"fill-in-the-middle: {form.value}"] += 1
            for part in parts:
                arrays += [np.array([part], np.uint32)] if isinstance(part, int) else list(encode(part))
        if transforms.combined is not None and arrays:
            ids_T = np.concatenate(arrays)
            arrays = [transforms.combined.split_documents(ids_T, np.array([ids_T.size]), [text])[0]]
        return [arrays]


def _text_of(text: str) -> Text:
    """A text from another program, which UTF-8 may not have."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return Text(error=RecordError(
            "lone surrogate", f"it has the lone surrogate {ascii(text[error.start])} at character {error.start}",
            "it stands for no character: remove it"))
    return Text(text)


def _not_encoded(error: EncodingError) -> RecordError:
    return RecordError("not encoded", str(error), "is it text? leave it out")


class _WrongId(Exception):
    """An id that the vocabulary does not have, somewhere in the block."""


class TokenOutput:
    """Collects the ids of one dataset as bytes in its dtype.

    Args:
        dtype: The dataset's.
        vocab_size: Largest id + 1.
        is_checked: Whether each text's ids are compared with it, not those of many at once.
    """

    def __init__(self, dtype: np.dtype, vocab_size: int, is_checked: bool) -> None:
        self.pieces: list[bytes] = []
        self.is_checked = is_checked
        self._dtype, self._vocab_size = dtype, vocab_size
        self._waiting: list[np.ndarray] = []
        self._num_waiting = 0
        self._lengths: list[int] = []
        self._sequences: list[int] = []
        self._max_token_id = -1

    def narrow(self, ids_T: np.ndarray) -> np.ndarray:
        """The ids in the dataset's dtype.

        Raises:
            RecordError: one is not in the vocabulary.
        """
        if ids_T.size and int(ids_T.max()) >= self._vocab_size:
            detail = (
                f"token id {int(ids_T.max())} with a vocabulary of {self._vocab_size}, stored as {self._dtype.name}"
            )
            raise RecordError(
                "token id out of range", detail, "use a tokenizer whose ids are below its vocabulary's size"
            )
        return ids_T.astype(self._dtype)

    def add(self, sequences: EncodedText) -> None:
        """Take a document's sequences, each in pieces of ids."""
        self._sequences.append(len(sequences))
        for arrays in sequences:
            length = sum(ids_T.size for ids_T in arrays)
            self._waiting += arrays
            self._lengths.append(length)
            self._num_waiting += length
        if self._num_waiting >= _FLUSH_TOKENS:
            self.flush()

    def flush(self) -> None:
        """Turn what is waiting into bytes."""
        for part_T in _join_small(self._waiting):
            largest = int(part_T.max())
            if largest >= self._vocab_size:
                raise _WrongId
            self._max_token_id = max(self._max_token_id, largest)
            self.pieces.append(part_T.astype(self._dtype, copy=False).tobytes())
        self._num_waiting = 0

    def result(self) -> EncodedKey:
        """Describe the documents that were taken; their bytes are in `pieces`."""
        lengths_Q = np.array(self._lengths, dtype=np.int32)
        return EncodedKey(lengths_Q, np.array(self._sequences, dtype=np.int32), len(self.pieces), self._max_token_id)


def _join_small(arrays: list[np.ndarray]) -> Iterator[np.ndarray]:
    """The arrays, small ones joined; the list is emptied on the way, so that large ones do not lie there twice."""
    small: list[np.ndarray] = []
    arrays.reverse()
    while arrays:
        ids_T = arrays.pop()
        if ids_T.size < _FLUSH_TOKENS:
            small.append(ids_T)
            continue
        if small:
            yield np.concatenate(small)
            small = []
        yield ids_T
    if small and (joined := np.concatenate(small)).size:
        yield joined
