"""JSON of others: what is beyond a bound is refused as what it is, before memory is taken."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from dsv3_megatron.config.json_files import (
    MAX_CONFIG,
    MAX_JSON,
    object_without_repeats,
    parse_json,
    read_json,
    read_json_object,
    read_text_file,
)


def test_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": [1, "\\u00e9"]}', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == read_json_object(tmp_path / "a.json") == {"a": [1, "é"]}
    (tmp_path / "b.json").write_text("[1]")
    with pytest.raises(ValueError, match="it must hold a JSON object, not a list"):
        read_json_object(tmp_path / "b.json")
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "c.json")


@pytest.mark.parametrize(("text", "why"), [
    ("[" * 100_000 + "]" * 100_000, "it is nested too deeply"), ("7" * 5000, "4300 digits"),
    ("[[]," * 4_000_001, "opening brackets; at most 4,000,000 are read"), ("{", "Expecting property name"),
    (b"\xff\xfe\x00", "codec can't decode"), (b"\xed\xa0\x80", "codec can't decode")])
def test_bombs_are_refused(text: str | bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_json(text)


def test_a_long_file_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    with open(file, "wb") as stream:
        stream.truncate(8_000_000_000)
    monkeypatch.setenv(MAX_JSON, "2")
    tracemalloc.start()
    with pytest.raises(ValueError, match=f"more than 2,000,000 bytes, .*; set {MAX_JSON} "):
        read_json(file)
    with pytest.raises(ValueError, match=f"more than 1,000,000 bytes, .*; set {MAX_CONFIG} "):
        read_text_file(file)
    assert tracemalloc.get_traced_memory()[1] < 6_000_000
    tracemalloc.stop()
    monkeypatch.setenv(MAX_JSON, "0x2")
    with pytest.raises(ValueError, match=f"{MAX_JSON}='0x2' must be a whole number from 1 to 100000"):
        read_json(file)


def test_a_name_that_is_given_twice() -> None:
    assert parse_json('{"a": 1, "b": {"a": 2}}', object_pairs_hook=object_without_repeats) == {"a": 1, "b": {"a": 2}}
    with pytest.raises(ValueError, match="'a' is given twice in one object"):
        parse_json('{"b": {"a": 1, "a": 2}}', object_pairs_hook=object_without_repeats)
