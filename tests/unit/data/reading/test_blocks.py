"""Blocks of lines: cut anywhere, and gone on from every position."""

import gzip
import itertools

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsv3_megatron.data.reading.blocks import InputPosition, iterate_blocks
from dsv3_megatron.data.reading.inputs import JobShard, expand_inputs, take_shard
from tests.unit.data.reading.files import jsonl, texts_of, zstd


def test_going_on_from_every_position(mixed):
    files, texts = mixed
    for num_done, position in texts_of(files, block_bytes=70)[1]:
        assert texts_of(files, position=position, block_bytes=110)[0] == texts[num_done:]


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


@pytest.mark.parametrize("index", [2, -1, 2**31 - 1])
def test_a_row_that_names_a_text_that_is_not_there(tmp_path, monkeypatch, index):
    """As a flipped bit in a page of numbers makes it; pyarrow does not look."""
    pq.write_table(pa.table({"text": pa.array(["one", None, "two"]).dictionary_encode()}), tmp_path / "a.parquet")
    damaged = pa.DictionaryArray.from_arrays(pa.array([0, index, 1], pa.int32()), pa.array(["one", "two"]), safe=False)
    monkeypatch.setattr(pq.ParquetFile, "iter_batches",
                        lambda *_, **__: [pa.RecordBatch.from_arrays([damaged], ["text"])])
    files = expand_inputs([str(tmp_path / "a.parquet")])
    (block,) = iterate_blocks(files, take_shard(files, JobShard()), keys=["text"], block_bytes=50_000,
                              position=InputPosition(), max_line_bytes=10**9)
    assert block.reject is not None and "not a whole Parquet file" in block.reject.detail
    assert block.data == [] and block.next == InputPosition(1)


def test_texts_that_a_file_has_once_for_many_rows(tmp_path):
    """Blocks stay about as large as they are to be; rows that are wanted from the middle are those."""
    texts = [letter * 1000 for letter in "abc"]
    rows = [None if number % 7 == 3 else texts[number % 3] for number in range(5000)]
    array = pa.array(rows).dictionary_encode()
    pq.write_table(pa.table({"text": array}), tmp_path / "a.parquet")
    files = expand_inputs([str(tmp_path / "a.parquet")])
    for start in (0, 1234):
        blocks = list(iterate_blocks(files, take_shard(files, JobShard()), keys=["text"], block_bytes=50_000,
                                     position=InputPosition(0, start), max_line_bytes=10**9))
        assert len(blocks) > 50 and max(len(block.data[0].data) for block in blocks) <= 50_000
        assert [blocks[0].start, blocks[-1].stop] == [start, 5000]
        assert all(one.stop == other.start for one, other in itertools.pairwise(blocks))
        found = []
        for block in blocks:
            (column,) = block.data
            ends = zip(column.offsets, column.offsets[1:], strict=False)
            found += [column.data[first:stop].decode() for first, stop in ends]
        assert found == [row or "" for row in rows[start:]]


def test_a_column_that_expands_as_no_text_does(tmp_path):
    pq.write_table(pa.table({"text": ["a" * 40_000_000]}), tmp_path / "a.parquet", compression="zstd",
                   use_dictionary=False)
    files = expand_inputs([str(tmp_path / "a.parquet")])
    (block,) = iterate_blocks(files, take_shard(files, JobShard()), keys=["text"], position=InputPosition(),
                              max_line_bytes=10**9)
    assert block.reject is not None and "over 200 times as many" in block.reject.detail


@pytest.mark.parametrize("num_rows", [2700, 65_000])
def test_rows_that_decode_to_far_more_than_the_file(tmp_path, num_rows):
    text = pa.DictionaryArray.from_arrays(pa.array([0] * num_rows, pa.int32()), pa.array(["a" * 1_000_000]))
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet", compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 3000
    files = expand_inputs([str(tmp_path / "a.parquet")])
    (block,) = iterate_blocks(files, take_shard(files, JobShard()), keys=["text"], position=InputPosition(),
                              max_line_bytes=10**9)
    assert block.reject is not None
    assert f"have {num_rows}000000 bytes of text that the file has once" in block.reject.detail
