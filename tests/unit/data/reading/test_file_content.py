"""What a file is, told by its content where the name says nothing or lies."""

import gzip

import pytest

from dsv3_megatron.data.reading.inputs import expand_inputs
from tests.unit.data.reading.files import COMPRESSORS, formats_in, jsonl, texts_of, write_parquet


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (jsonl(["x", "y"]), ("jsonl", "")),
        (b"\xef\xbb\xbf" + jsonl(["x"]), ("jsonl", "")),
        (b"\n\n  " + jsonl(["x"]), ("jsonl", "")),
        (jsonl(["long " * 40_000]), ("jsonl", "")),  # longer than what is looked at
        (b"", ("jsonl", "")),
        (b"Some prose.\n{braces}\n", ("text", "")),
        (b"{braces} and prose\n", ("text", "")),
        (b"{" + b"brace " * 20_000, ("text", "")),
        (b'["a", "list"]\n', ("text", "")),
    ],
)
@pytest.mark.parametrize("compression", ["", *COMPRESSORS])
def test_content_decides_where_the_name_says_nothing(tmp_path, content, expected, compression):
    (tmp_path / "part-0000").write_bytes(COMPRESSORS[compression](content) if compression else content)
    (file,) = expand_inputs([str(tmp_path / "part-0000")])
    assert (file.format, file.compression) == (expected[0], compression)


def test_parquet_without_its_ending(tmp_path):
    for name in ("part-0000", "wrong.jsonl"):
        write_parquet(tmp_path / name, ["one", "two"])
    assert texts_of(expand_inputs([str(tmp_path)]))[0] == ["one", "two"] * 2


@pytest.mark.parametrize("kind", COMPRESSORS)
def test_names_that_lie_about_compression(tmp_path, kind, capsys):
    (tmp_path / "a.jsonl").write_bytes(COMPRESSORS[kind](jsonl(["one"])))
    (tmp_path / f"b.jsonl.{kind}").write_bytes(jsonl(["two"]))
    (tmp_path / "c.jsonl.gz").write_bytes(COMPRESSORS[kind](jsonl(["three"])))
    assert texts_of(expand_inputs([str(tmp_path)]))[0] == ["one", "two", "three"]
    err = capsys.readouterr().err
    assert f"a.jsonl: compressed as {kind} by content, which counts" in err or f"2 files such as {tmp_path}/a.js" in err


def test_folders_of_records_without_endings(tmp_path, capsys):
    """As Spark and WikiExtractor leave them."""
    (tmp_path / "AA").mkdir()
    for name in ("AA/wiki_00", "AA/wiki_01", "part-00000-c000"):
        (tmp_path / name).write_bytes(jsonl([name]))
    (tmp_path / "part-00001-c000.gz").write_bytes(gzip.compress(jsonl(["zipped"])))
    for name in ("_SUCCESS", "_metadata", "_started_17", ".part-00000.crc", "AA/_SUCCESS", "empty"):
        (tmp_path / name).touch()
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "LICENSE").write_text("free")
    assert texts_of(expand_inputs([str(tmp_path)]))[0] == ["AA/wiki_00", "AA/wiki_01", "part-00000-c000", "zipped"]
    assert capsys.readouterr().err == (
        f"note: {tmp_path}: 4 JSON lines files taken; left out: 4 (a marker such as _SUCCESS), 1 (empty), 1 (hidden), "
        "2 (text)\n"
    )
    assert texts_of(expand_inputs([f"{tmp_path}/part*", f"{tmp_path}/_*"]))[0] == ["part-00000-c000", "zipped"]
    assert "left out: 3 (a marker such as _SUCCESS)" in capsys.readouterr().err


def test_records_and_texts_that_no_name_tells_apart(tmp_path):
    (tmp_path / "one").write_bytes(jsonl(["x"]))
    (tmp_path / "two").write_text("prose")
    with pytest.raises(ValueError, match="holds JSON lines, such as .*one, and text, such as .*two, and no name tells"):
        expand_inputs([str(tmp_path)])
    assert formats_in(tmp_path, "text") == [("one", "text"), ("two", "text")]
    (tmp_path / "three.jsonl").write_bytes(jsonl(["y"]))  # a name that says what the folder is for
    assert formats_in(tmp_path) == [("one", "jsonl"), ("three.jsonl", "jsonl")]
