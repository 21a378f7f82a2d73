"""Blocks of lines: cut anywhere, and gone on from every position."""

import gzip

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsv3_megatron.data.reading.inputs import JobShard, expand_inputs
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
