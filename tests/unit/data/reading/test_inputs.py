"""Which files, in which order and format; blocks and shards cover every document once, from any position."""

import gzip
import os

import pytest

from dsv3_megatron.data.reading.inputs import InputFile, JobShard, expand_inputs, take_shard
from tests.unit.data.reading.files import formats_in, jsonl, texts_of


def test_formats_and_order(mixed):
    files, _ = mixed
    kinds = [(file.format, file.compression) for file in files]
    assert (
        kinds
        == [("jsonl", ""), ("jsonl", "gz"), ("jsonl", "bz2"), ("jsonl", "xz"), ("jsonl", "zst"), ("parquet", "")]
        + [("text", "")] * 9
    )


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40, 500])
def test_shards_are_the_job(mixed, count):
    files, texts = mixed
    parts = [texts_of(files, shard=JobShard(index, count))[0] for index in range(1, count + 1)]
    assert [text for part in parts for text in part] == texts
    assert sum(map(bool, parts)) >= min(count, 2)


def test_a_format_that_is_given_counts(tmp_path):
    (tmp_path / "data.bin").write_bytes(jsonl(["x"]))
    (tmp_path / "data.txt").write_bytes(jsonl(["x"]))
    assert expand_inputs([str(tmp_path / "data.bin")])[0].format == "jsonl"
    assert expand_inputs([str(tmp_path / "data.txt")])[0].format == "text"
    assert expand_inputs([str(tmp_path / "data.txt")], format="jsonl")[0].format == "jsonl"


@pytest.mark.parametrize(
    ("patterns", "keywords", "message"),
    [
        (
            ["none.jsonl"],
            {},
            "input none.jsonl does not exist: give files, globs or folders of JSON lines, Parquet or text",
        ),
        (["no*.jsonl"], {}, r"input no\*.jsonl matches no file: give"),
        (["-"], {"format": "parquet"}, "input -: Parquet cannot be read from standard input; give a file"),
        (
            ["-"],
            {"format": "text"},
            "input -: a text file cannot be read from standard input; give a file, or JSON lines",
        ),
        (["-"], {"format": "csv"}, "input_format='csv' must be one of auto, jsonl, parquet, text"),
    ],
)
def test_bad_inputs(patterns, keywords, message):
    with pytest.raises(ValueError, match=message):
        expand_inputs(patterns, **keywords)


def test_what_is_no_file(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["x"]))
    os.mkfifo(tmp_path / "pipe")
    assert formats_in(tmp_path) == [("a.jsonl", "jsonl")]
    assert "left out: 1 (a pipe or device)" in capsys.readouterr().err
    (tmp_path / "lost.jsonl").symlink_to("/nowhere/x")
    for path in (tmp_path, tmp_path / "lost.jsonl", f"{tmp_path}/l*"):
        with pytest.raises(ValueError, match="lost.jsonl is a link to /nowhere/x, which is not there"):
            expand_inputs([str(path)])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", b"a,b\n1,2\n", "CSV, write JSON lines or Parquet"),
        ("x.zip", b"PK\x03\x04...", "a zip archive, unpack it"),
        ("x", b"PK\x03\x04...", "a zip archive, unpack it"),
        ("x.jsonl", b"%PDF-1.7", "a PDF, extract its text"),
        ("x.tar.gz", gzip.compress(b"a" * 257 + b"ustar\x0000", mtime=0), "a tar archive, unpack it"),
        ("x.bin", b"ARROW1\0\0", "an Arrow file, write Parquet"),
    ],
)
def test_what_is_not_read_is_refused_by_name(tmp_path, name, content, message, capsys):
    (tmp_path / name).write_bytes(content)
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(ValueError, match=f"{name}: {message}"):
            expand_inputs([str(path)])
    assert expand_inputs([str(tmp_path / name)], format="text")[0].format == "text"
    (tmp_path / "records.jsonl").write_bytes(jsonl(["x"]))
    assert formats_in(tmp_path) == [("records.jsonl", "jsonl")]
    assert "left out: 1 (not read here)" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "1/0", "-1/2"])
def test_bad_shards(text):
    with pytest.raises(ValueError, match=r"must be I/N with 1 <= I <= N, the first shard of three being 1/3"):
        JobShard.parse(text)
    with pytest.raises(ValueError, match="standard input.* cannot be cut into shards"):
        take_shard([InputFile("-", "jsonl")], JobShard(1, 2))
