"""Which files, in which order and format; blocks and shards cover every document once, from any position."""

import bz2
import gzip
import lzma
import os
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsv3_megatron.data.reading.blocks import InputPosition, iterate_blocks
from dsv3_megatron.data.reading.documents import Reading, RecordReader, read_documents, sample_documents
from dsv3_megatron.data.reading.inputs import InputFile, JobShard, expand_inputs, take_shard

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

COMPRESSORS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd.compress}


def jsonl(texts, end="\n"):
    import json

    return end.join(json.dumps({"text": text}, ensure_ascii=False) for text in texts).encode() + end.encode()


def texts_of(files, *, shard=JobShard(), position=InputPosition(), block_bytes=50, keys=("text",)):  # noqa: B008 - frozen
    """Texts of a shard from a position on, and the position behind each block."""
    reader = RecordReader(files, keys)
    found, positions = [], []
    portions = take_shard(files, shard)
    for block in iterate_blocks(
        files, portions, keys=keys, position=position, max_line_bytes=reader.max_line_bytes, block_bytes=block_bytes
    ):
        reading = Reading()
        for record in reader.read(block, reading):
            (text,) = record.texts
            assert text.error is None, text.error
            found.append(text.text)
        assert not reading.rejects
        positions.append((len(found), block.next))
    return found, positions


def write_parquet(path, texts, **options):
    pq.write_table(pa.table({"id": list(range(len(texts))), "text": texts}), path, **options)


@pytest.fixture
def mixed(tmp_path):
    """One file of every kind and the texts in them, in order."""
    groups = [[f"{name} {number} é中\n" * (number % 4 + 1) for number in range(9)] for name in "abcdefg"]
    (tmp_path / "a.jsonl").write_bytes(jsonl(groups[0]))
    for letter, kind, texts in zip("bcde", COMPRESSORS, groups[1:5], strict=True):
        (tmp_path / f"{letter}.jsonl.{kind}").write_bytes(COMPRESSORS[kind](jsonl(texts)))
    write_parquet(tmp_path / "f.parquet", groups[5], row_group_size=4)
    (tmp_path / "g").mkdir()
    for number, text in enumerate(groups[6]):
        (tmp_path / "g" / f"{number}.txt").write_text(text, encoding="utf-8")
    patterns = [str(tmp_path / "*.jsonl*"), str(tmp_path / "f.parquet"), str(tmp_path / "g")]
    return expand_inputs(patterns), [text for group in groups for text in group]


def test_formats_and_order(mixed):
    files, _ = mixed
    kinds = [(file.format, file.compression) for file in files]
    assert (
        kinds
        == [("jsonl", ""), ("jsonl", "gz"), ("jsonl", "bz2"), ("jsonl", "xz"), ("jsonl", "zst"), ("parquet", "")]
        + [("text", "")] * 9
    )


@pytest.mark.parametrize("block_bytes", [1, 40, 333, 10**6])
def test_every_format_gives_every_document(mixed, block_bytes):
    files, texts = mixed
    assert texts_of(files, block_bytes=block_bytes)[0] == texts == list(read_documents(files, "text"))


def test_going_on_from_every_position(mixed):
    files, texts = mixed
    for num_done, position in texts_of(files, block_bytes=70)[1]:
        assert texts_of(files, position=position, block_bytes=110)[0] == texts[num_done:]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40, 500])
def test_shards_are_the_job(mixed, count):
    files, texts = mixed
    parts = [texts_of(files, shard=JobShard(index, count))[0] for index in range(1, count + 1)]
    assert [text for part in parts for text in part] == texts
    assert sum(map(bool, parts)) >= min(count, 2)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.text("ab\n é", max_size=30), max_size=12),
    st.integers(1, 80),
    st.integers(1, 5),
    st.booleans(),
    st.sampled_from(["\n", "\r\n", "\n\n"]),
)
def test_lines_cut_anywhere(tmp_path, texts, block_bytes, count, ends_with_newline, end):
    content = jsonl(texts, end) if texts else b""
    (tmp_path / "x.jsonl").write_bytes(content if ends_with_newline else content.rstrip(b"\r\n"))
    files = expand_inputs([str(tmp_path / "x.jsonl")])
    parts = [texts_of(files, shard=JobShard(index, count), block_bytes=block_bytes)[0] for index in range(1, count + 1)]
    assert [text for part in parts for text in part] == texts
    (tmp_path / "x.gz").write_bytes(gzip.compress((tmp_path / "x.jsonl").read_bytes()))
    assert texts_of(expand_inputs([str(tmp_path / "x.gz")]), block_bytes=block_bytes)[0] == texts


def test_gzip_and_zstd_of_several_members(tmp_path):
    parts = [jsonl(["one"]), jsonl(["two", "three"])]
    (tmp_path / "x.jsonl.gz").write_bytes(b"".join(map(gzip.compress, parts)))
    (tmp_path / "x.jsonl.zst").write_bytes(b"".join(map(zstd.compress, parts)))
    (tmp_path / "empty.jsonl.zst").write_bytes(zstd.compress(b""))
    (tmp_path / "empty.jsonl").touch()
    assert texts_of(expand_inputs([str(tmp_path)]))[0] == ["one", "two", "three"] * 2


@pytest.mark.parametrize("kind", ["string", "large_string", "binary", "dictionary", "string_view"])
def test_columns_of_every_string_type(tmp_path, kind):
    texts = ["one", "", "é中", "one"]
    array = pa.array(texts)
    array = array.dictionary_encode() if kind == "dictionary" else array.cast(getattr(pa, kind)())
    pq.write_table(pa.table({"text": array}), tmp_path / "x.parquet")
    assert texts_of(expand_inputs([str(tmp_path / "x.parquet")]))[0] == texts


def test_folders(tmp_path, capsys):
    (tmp_path / "texts" / "sub").mkdir(parents=True)
    (tmp_path / "texts" / ".hidden").mkdir()
    for name in ("b.py", "sub/a", ".hidden/x", ".x"):
        (tmp_path / "texts" / name).write_text(name)
    found = expand_inputs([str(tmp_path / "texts")])
    assert [(file.path.removeprefix(f"{tmp_path}/texts/"), file.format) for file in found] == [
        ("b.py", "text"),
        ("sub/a", "text"),
    ]
    (tmp_path / "texts" / "c.jsonl.gz").write_bytes(gzip.compress(jsonl(["x"])))
    assert [file.format for file in expand_inputs([str(tmp_path / "texts")])] == ["jsonl"]
    assert "1 JSON lines files taken; left out: 2 (hidden), 2 (text)" in capsys.readouterr().err
    (tmp_path / "no").mkdir()
    with pytest.raises(ValueError, match="the folder holds no files"):
        expand_inputs([str(tmp_path / "no")])


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


def formats_in(path, format="auto"):
    return [(os.path.relpath(file.path, path), file.format) for file in expand_inputs([str(path)], format=format)]


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


def test_links_are_followed_once(tmp_path, capsys):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "b.jsonl").write_bytes(jsonl(["outside"]))
    (outside / "back").symlink_to("../data")
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.jsonl").write_bytes(jsonl(["inside"]))
    (data / "link").symlink_to("../outside")
    (data / "z").symlink_to(".")
    assert texts_of(expand_inputs([str(data)]))[0] == ["inside", "outside"]
    assert "left out: 2 (a folder reached twice by links)" in capsys.readouterr().err
    # A glob meets the same files again by way of the links.
    assert sorted(texts_of(expand_inputs([f"{data}/*"]))[0]) == ["inside", "outside"]
    assert "(another name of a file that is read)" in capsys.readouterr().err
    # Two names that were given are two files.
    (data / "again.jsonl").symlink_to("a.jsonl")
    assert texts_of(expand_inputs([f"{data}/a.jsonl", f"{data}/again.jsonl"]))[0] == ["inside"] * 2


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


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["x"]))
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refuse(path):  # as for another user than root
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="closed"):
        expand_inputs([str(tmp_path)])


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "1/0", "-1/2"])
def test_bad_shards(text):
    with pytest.raises(ValueError, match=r"must be I/N with 1 <= I <= N, the first shard of three being 1/3"):
        JobShard.parse(text)
    with pytest.raises(ValueError, match="standard input.* cannot be cut into shards"):
        take_shard([InputFile("-", "jsonl")], JobShard(1, 2))


def test_samples_come_from_all_over_every_file(mixed):
    files, texts = mixed
    samples = list(sample_documents(files, take_shard(files, JobShard()), ["text"], max_bytes=10**6))
    assert {where.split(", byte")[0] for where, _ in samples} == {file.path for file in files}
    assert all(text in texts for _, text in samples)


def test_samples_are_bounded(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(jsonl([letter * 9000 for letter in "abcdefghijkl"]))
    files = expand_inputs([str(tmp_path / "x.jsonl")])
    samples = list(sample_documents(files, take_shard(files, JobShard()), ["text"], max_bytes=8000))
    assert len({text[0] for _, text in samples}) == 4
    assert sum(len(text) for _, text in samples) == 8000


def test_reading_names_the_place(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["x"] * 3))
    (tmp_path / "b.jsonl").write_bytes(jsonl(["x"] * 2) + b"{]\n")
    documents = read_documents(expand_inputs([str(tmp_path)]), "text")
    assert [next(documents) for _ in range(5)] == ["x"] * 5
    with pytest.raises(ValueError) as error:
        next(documents)
    assert str(error.value).startswith(f"{tmp_path}/b.jsonl, line 3, byte 29: invalid JSON (Expecting property name")
