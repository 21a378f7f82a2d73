"""A block of JSON lines to the ids of conversations and what counts of them: what the workers of preprocessing do."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dsv3_megatron.data.block_encoder import BlockEncoder, EncodedText, TokenOutput
from dsv3_megatron.data.chat.conversation import read_conversation
from dsv3_megatron.data.chat.template import ChatTemplate
from dsv3_megatron.data.encoder import HuggingFaceEncoder
from dsv3_megatron.data.reading.documents import Reading, Record, RecordReader
from dsv3_megatron.data.reading.json_lines import RecordError, decode_utf8

COUNTED_NOTE = "tokens count in the loss"


class WholeLines:
    """A parser of JSON lines that gives each line as its one text."""

    def parse(self, line: bytes | memoryview) -> list[str]:
        """The line, whose bytes are known to be UTF-8."""
        return [decode_utf8(bytes(line))]

    def parse_long(self, line: memoryview) -> list[Iterator[str]]:
        """The line, of any length, as one piece."""
        return [iter(self.parse(line))]


class ConversationEncoder(BlockEncoder):
    """Encodes blocks of conversations; made once, before the workers are forked.

    Args:
        reader: Reader of the blocks, which gives whole lines.
        encoder: The tokenizer.
        template: The chat template.
        is_stopping: Stop a block at its first reject.
    """

    def __init__(self, reader: RecordReader, encoder: HuggingFaceEncoder, template: ChatTemplate, *,
                 is_stopping: bool) -> None:
        super().__init__(reader, encoder, eod_id=None, is_stopping=is_stopping, is_wrapped=False)
        self.tokenizer, self.template = encoder, template

    def _outputs(self, *, is_checked: bool) -> list[TokenOutput]:
        return [TokenOutput(self.dtype, self.encoder.vocab_size, is_checked),
                TokenOutput(np.dtype(np.uint8), 2, is_checked)]

    def _encode_record(self, record: Record, output: list[TokenOutput], reading: Reading) -> list[EncodedText]:
        (text,) = record.texts
        if text.error is not None:
            raise text.error
        assert text.text is not None, "lines are not split"
        conversation = read_conversation(text.text)
        ids_T, mask_T = self.encode(*self.template.render_parts(conversation))
        reading.notes[COUNTED_NOTE] += int(mask_T.sum())
        if conversation.messages[-1]["role"] != "assistant":
            reading.notes["conversations do not end with the assistant's turn"] += 1
        return [[[output[0].narrow(ids_T)]], [[mask_T]]]

    def encode(self, text: str, parts: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a rendered conversation, and what counts of them.

        Args:
            text: Rendered conversation; the template has put special tokens into it, so none are added.
            parts: [first, stop) characters of each part that counts.

        Returns:
            uint32 ids [T], and uint8 [T]: 1 where the token counts.

        Raises:
            EncodingError: the tokenizer gives no ids.
            RecordError: a part has no token.
        """
        ids_T, offsets_T2 = self.tokenizer.encode_with_offsets(text)
        return ids_T, counted_tokens(offsets_T2, parts)


def counted_tokens(offsets_T2: np.ndarray, parts: list[tuple[int, int]]) -> np.ndarray:
    """Mark the tokens that have a character of a part, and those between them: uint8 [T].

    Args:
        offsets_T2: [first, stop) characters of each token, int64 [T, 2], rising.
        parts: [first, stop) characters of each part.

    Raises:
        RecordError: no token has a character of some part.
    """
    mask_T = np.zeros(len(offsets_T2), dtype=np.uint8)
    for first, stop in parts:
        inside = np.flatnonzero((offsets_T2[:, 1] > first) & (offsets_T2[:, 0] < stop))
        if not inside.size:
            raise RecordError("assistant turn without tokens", f"no token for characters {first} to {stop - 1} of the "
                              "rendered conversation, an assistant's part", "does the tokenizer drop white space?")
        mask_T[inside[0] : inside[-1] + 1] = 1
    return mask_T
