"""A line of JSON to its texts: what Python's json takes is taken, what it refuses is named with its byte."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_megatron.data.reading import json_lines
from dsv3_megatron.data.reading.json_lines import LineParser, RecordError, find_invalid_utf8

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200)
@given(st.dictionaries(ANY_TEXT, JSON_VALUES, max_size=4), ANY_TEXT, st.booleans(), st.booleans())
def test_the_text_is_jsons(others, text, is_ascii, is_long):
    line = json.dumps(others | {"text": text}, ensure_ascii=is_ascii).encode()
    parser = LineParser(["text"])
    if is_long:
        (pieces,) = parser.parse_long(memoryview(line))
        assert "".join(pieces) == text
    else:
        assert parser.parse(line) == [text] == parser.parse(memoryview(line))


@settings(max_examples=200)
@given(st.text(st.sampled_from('ab \n"\\/\t\u00e9\u4e2d😀\u2028'), max_size=200), st.booleans(), st.integers(1, 40))
def test_long_texts_in_pieces(text, is_ascii, piece_bytes):
    line = json.dumps({"a": 1, "text": text}, ensure_ascii=is_ascii).encode()
    before, json_lines._PIECE_BYTES = json_lines._PIECE_BYTES, piece_bytes
    try:
        (pieces,) = LineParser(["text"]).parse_long(memoryview(line))
        assert "".join(pieces) == text
    finally:
        json_lines._PIECE_BYTES = before


def test_several_keys_in_the_order_asked_for():
    assert LineParser(["b", "a-b", "class"]).parse(b'{"class": "3", "a-b": "2", "x": {"b": 0}, "b": "1"}') == [
        "1",
        "2",
        "3",
    ]


def test_what_json_takes_is_taken():
    parser = LineParser(["text"])
    for line in (
        b'{"text": "a", "n": NaN}',
        b'{"text": "a", "n": 1e999}',
        b'{"text": "b", "text": "a"}\r',
        b'{"text": "a", "x": "\\ud800"}',
        b' {"te\\u0078t": "a"} ',
    ):
        assert parser.parse(line) == ["a"] == ["".join(part) for part in parser.parse_long(memoryview(line))]
    assert parser.parse(b'{"text": "\\u0000"}') == ["\0"]  # a character like any other, as for Megatron-LM's tool


BAD_LINES = [
    (b'{"text": nope}', "invalid JSON", 9, "invalid JSON (Expecting value); each line must be one JSON object"),
    (b'{"text": "a"', "invalid JSON", 12, "invalid JSON (Expecting ',' delimiter); each line"),
    (b'{"text": "\xc3\xa9"} x', "invalid JSON", 15, "invalid JSON (Extra data); each line"),
    (b'{"text": "a\tb"}', "invalid JSON", 11, "invalid JSON (Invalid control character at); each line"),
    (b'{"text": "a\0b"}', "NUL byte", 11, "a NUL byte; is it a text file? remove it"),
    (
        b'\xef\xbb\xbf{"text": "a"}',
        "byte-order mark",
        0,
        "a byte-order mark inside the file; were files joined? remove it",
    ),
    (b'["text"]', "not an object", 0, "a JSON list; each line must be one JSON object"),
    (b'{"t": 1, "u": 2}', "missing key", 0, "no key 'text' (keys: t, u); name the text's key with --json-keys"),
    (b"{}", "missing key", 0, "no key 'text' (keys: none); name"),
    (b'{"text": null}', "not a string", 0, "'text' holds a null; the text must be a JSON string"),
    (b'{"text": 5}', "not a string", 0, "'text' holds a int; the text must be a JSON string"),
    (b'{"text": ["a"]}', "not a string", 0, "'text' holds a list; the text must be a JSON string"),
    (
        b'{"text": "ab\\ud800c"}',
        "lone surrogate",
        0,
        r"'text' has the lone surrogate '\ud800' at character 2; it stands",
    ),
    (b'{"text": "\xff"}', "invalid UTF-8", 10, "not UTF-8 (byte 0xff); convert the file to UTF-8, with iconv"),
    (b'{"text": "\xed\xa0\x80"}', "invalid UTF-8", 10, "not UTF-8 (byte 0xed); convert"),
    (b'{"text":' + b"[" * 100_000, "invalid JSON", 0, "JSON nested too deeply; flatten it"),
]


@pytest.mark.parametrize("is_long", [False, True], ids=["line", "long line"])
@pytest.mark.parametrize(
    ("line", "reason", "byte", "message"), BAD_LINES, ids=[f"{line[:24]!r}" for line, *_ in BAD_LINES]
)
def test_what_is_wrong_is_said(line, reason, byte, message, is_long):
    parser = LineParser(["text"])
    with pytest.raises(RecordError) as error:
        if is_long:
            for pieces in parser.parse_long(memoryview(line)):
                list(pieces)
        else:
            parser.parse(line)
    reject = error.value.reject
    assert str(error.value).startswith(message)
    assert reject.reason == reason
    if not is_long or reason != "invalid UTF-8":  # there the byte is that of the piece
        assert reject.byte == byte


def test_find_invalid_utf8():
    assert find_invalid_utf8(b"abc") is None and find_invalid_utf8("é中😀".encode()) is None
    assert find_invalid_utf8(bytearray(b"ab\xc3")) == 2 and find_invalid_utf8(memoryview(b"\x80")) == 0


@pytest.mark.parametrize("is_long", [False, True])
def test_a_number_of_more_digits_than_python_reads(is_long):
    line = memoryview(b'{"text": ' + b"7" * 5000 + b"}")
    with pytest.raises(RecordError, match="4300 digits.* write such a number as a text"):
        list(LineParser(["text"]).parse_long(line) if is_long else LineParser(["text"]).parse(line))
