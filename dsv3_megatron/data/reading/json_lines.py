"""One line of JSON to its texts, and every way in which it can be wrong, said exactly.

A fast parser (msgspec) takes what is right. Whatever it refuses goes to Python's own `json`, which decides: it accepts
what Megatron-LM's tool accepts (NaN among the other fields, say) or names the error and its byte.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

UTF8_BOM = b"\xef\xbb\xbf"
# A text in a line beyond this is handed on in pieces, never whole, so that its memory stays near its own size.
LONG_LINE_BYTES = 16_000_000
_PIECE_BYTES = 1_000_000
# Where a JSON string may be cut: no escape (the longest has 12 bytes, \ud83d\ude00) and no character reaches across.
_BETWEEN_CHARACTERS = re.compile(rb"[^\\]{12}(?![\x80-\xbf])")


@dataclass(frozen=True)
class Reject:
    """Why an input could not become a document. Becomes the error that ends a run, or a line of the rejects file.

    Attributes:
        reason: Short and the same for all of its kind, for counting.
        detail: Description of what was found.
        way_out: Advice on what to do about it.
        byte: Offset in the record, later in the file (uncompressed).
        line: Number in the file, from 1; 0 where the file has no lines.
    """

    reason: str
    detail: str
    way_out: str
    byte: int = 0
    line: int = 0


class RecordError(ValueError):
    """Error that carries a Reject."""

    def __init__(self, reason: str, detail: str, way_out: str, byte: int = 0) -> None:
        super().__init__(f"{detail}; {way_out}")
        self.reject = Reject(reason, detail, way_out, byte)


class TextParser(Protocol):
    """Takes texts out of a line of JSON, whose bytes are known to be UTF-8; raises RecordError where it cannot."""

    def parse(self, line: bytes | memoryview) -> list[str]:
        """The texts of one line."""
        ...

    def parse_long(self, line: memoryview) -> list[Iterator[str]]:
        """The texts of a line of any length, each in pieces."""
        ...


class LineParser:
    """Takes the texts out of JSON lines.

    Args:
        keys: Names of the texts, in the order wanted.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self.keys = tuple(keys)
        names = {f"text_{index}": key for index, key in enumerate(self.keys)}
        record = msgspec.defstruct("Record", [(name, str) for name in names], rename=names)
        self._decode = msgspec.json.Decoder(record).decode
        self._decode_raw = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
        self._fields = record.__struct_fields__

    def parse(self, line: bytes | memoryview) -> list[str]:
        """The texts of one line, whose bytes are known to be UTF-8.

        Raises:
            RecordError: not a JSON object with a string for each key.
        """
        try:
            record = self._decode(line)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return self._parse_slowly(bytes(line))
        return [getattr(record, name) for name in self._fields]

    def parse_long(self, line: memoryview) -> list[Iterator[str]]:
        """Take the texts out of a line of any length, each in pieces.

        Raises:
            RecordError: the line is rejected; for an error inside a text's string, when its piece is asked for.
        """
        try:
            record = self._decode_raw(line)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return [iter([text]) for text in self._parse_slowly(bytes(line))]
        self._check_keys(record)
        raws = [memoryview(record[key]) for key in self.keys]
        for key, raw in zip(self.keys, raws, strict=True):
            if raw[0] != ord('"'):
                self._parse_slowly(bytes(line))  # says what it is, or what is wrong with it
                raise AssertionError(f"{key!r} holds no string")
        return [_unescape(key, raw) for key, raw in zip(self.keys, raws, strict=True)]

    def _parse_slowly(self, line: bytes) -> list[str]:
        string = decode_utf8(line)
        try:
            record = json.loads(string)
        except json.JSONDecodeError as error:
            byte = len(string[: error.pos].encode("utf-8"))
            if string[error.pos : error.pos + 1] == "\ufeff":
                raise RecordError(
                    "byte-order mark", "a byte-order mark inside the file", "were files joined? remove it", byte
                ) from None
            if string[error.pos : error.pos + 1] == "\0":
                raise RecordError("NUL byte", "a NUL byte", "is it a text file? remove it", byte) from None
            raise RecordError(
                "invalid JSON", f"invalid JSON ({error.msg})", "each line must be one JSON object", byte
            ) from None
        except RecursionError:
            raise RecordError("invalid JSON", "JSON nested too deeply", "flatten it") from None
        except ValueError as error:  # a number of more digits than Python reads
            raise RecordError("invalid JSON", f"invalid JSON ({error})", "write such a number as a text") from None
        if not isinstance(record, dict):
            what = f"a JSON {type(record).__name__}"
            raise RecordError("not an object", what, "each line must be one JSON object")
        self._check_keys(record)
        texts = [record[key] for key in self.keys]
        for key, text in zip(self.keys, texts, strict=True):
            if not isinstance(text, str):
                raise _not_a_string(key, text)
            _refuse_lone_surrogate(key, text)
        return texts

    def _check_keys(self, record: dict[str, Any]) -> None:
        for key in self.keys:
            if key not in record:
                found = ", ".join(sorted(record)) or "none"
                detail = f"no key {key!r} (keys: {found[:200]})"
                raise RecordError("missing key", detail, "name the text's key with --json-keys")


def find_invalid_utf8(data: bytes | bytearray | memoryview) -> int | None:
    """Offset of the first byte that is not UTF-8."""
    if isinstance(data, memoryview):
        data = bytes(data)
    if data.isascii():
        return None
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start
    return None


def invalid_utf8(data: bytes, byte: int) -> RecordError:
    """The error for bytes that are not UTF-8, with a guess at what they are."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        what = "UTF-16 (by its byte-order mark)"
    else:
        what = f"not UTF-8 (byte 0x{data[byte]:02x})"
    return RecordError("invalid UTF-8", what, "convert the file to UTF-8, with iconv for instance", byte)


def decode_utf8(line: bytes) -> str:
    """The text of some bytes; raises RecordError where they are not UTF-8."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise invalid_utf8(line, error.start) from None


def _not_a_string(key: str, value: Any) -> RecordError:
    kind = "null" if value is None else type(value).__name__
    return RecordError("not a string", f"{key!r} holds a {kind}", "the text must be a JSON string")


def _refuse_lone_surrogate(key: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        detail = f"{key!r} has the lone surrogate {ascii(text[error.start])} at character {error.start}"
        raise RecordError("lone surrogate", detail, "it stands for no character: remove it") from None


def _unescape(key: str, raw: memoryview) -> Iterator[str]:
    """Decode a JSON string, quotes included, piece by piece; a piece never ends inside an escape or a character."""
    start, end = 1, len(raw) - 1
    while start < end:
        stop = end
        if end - start > _PIECE_BYTES:
            cut = _BETWEEN_CHARACTERS.search(raw, start + _PIECE_BYTES, end)
            stop = cut.end() if cut else end
        piece = b'"%b"' % bytes(raw[start:stop])
        try:
            yield msgspec.json.decode(piece, type=str)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            text = json.loads(decode_utf8(piece))
            _refuse_lone_surrogate(key, text)
            yield text
        start = stop
