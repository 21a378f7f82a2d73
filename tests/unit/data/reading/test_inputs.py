"""Which files, in which order and format; blocks and shards cover every document once, from any position."""

import bz2
import gzip
import lzma
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsv3_megatron.data.reading.blocks import Position, iterate_blocks
from dsv3_megatron.data.reading.documents import Reading, RecordReader, read_documents, sample_documents
from dsv3_megatron.data.reading.inputs import InputFile, Shard, expand_inputs, take_shard

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

COMPRESSORS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd.compress}


def jsonl(texts, end="\n"):
    import json

    return end.join(json.dumps({"text": text}, ensure_ascii=False) for text in texts).encode() + end.encode()


def texts_of(files, *, shard=Shard(), position=Position(), block_bytes=50, keys=("text",)):  # noqa: B008 - frozen
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
    parts = [texts_of(files, shard=Shard(index, count))[0] for index in range(1, count + 1)]
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
    parts = [texts_of(files, shard=Shard(index, count), block_bytes=block_bytes)[0] for index in range(1, count + 1)]
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
    (tmp_path / "texts" / "c.jsonl.gz").touch()
    assert [file.format for file in expand_inputs([str(tmp_path / "texts")])] == ["jsonl"]
    assert "1 JSON lines and Parquet files taken, 2 others left" in capsys.readouterr().err
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


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "1/0", "-1/2"])
def test_bad_shards(text):
    with pytest.raises(ValueError, match=r"must be I/N with 1 <= I <= N, the first shard of three being 1/3"):
        Shard.parse(text)
    with pytest.raises(ValueError, match="standard input.* cannot be cut into shards"):
        take_shard([InputFile("-", "jsonl")], Shard(1, 2))


def test_samples_come_from_all_over_every_file(mixed):
    files, texts = mixed
    samples = list(sample_documents(files, take_shard(files, Shard()), ["text"], max_bytes=10**6))
    assert {where.split(", byte")[0] for where, _ in samples} == {file.path for file in files}
    assert all(text in texts for _, text in samples)


def test_samples_are_bounded(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(jsonl([letter * 9000 for letter in "abcdefghijkl"]))
    files = expand_inputs([str(tmp_path / "x.jsonl")])
    samples = list(sample_documents(files, take_shard(files, Shard()), ["text"], max_bytes=8000))
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
