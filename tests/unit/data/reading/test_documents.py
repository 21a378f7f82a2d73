"""Documents of files: every format gives every one, and samples come from all over."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dsv3_megatron.data.reading.documents import read_documents, sample_documents
from dsv3_megatron.data.reading.inputs import JobShard, expand_inputs, take_shard
from tests.unit.data.reading.files import jsonl, texts_of


@pytest.mark.parametrize("block_bytes", [1, 40, 333, 10**6])
def test_every_format_gives_every_document(mixed, block_bytes):
    files, texts = mixed
    assert texts_of(files, block_bytes=block_bytes)[0] == texts == list(read_documents(files, "text"))


@pytest.mark.parametrize("kind", ["string", "large_string", "binary", "dictionary", "string_view"])
def test_columns_of_every_string_type(tmp_path, kind):
    texts = ["one", "", "é中", "one"]
    array = pa.array(texts)
    array = array.dictionary_encode() if kind == "dictionary" else array.cast(getattr(pa, kind)())
    pq.write_table(pa.table({"text": array}), tmp_path / "x.parquet")
    assert texts_of(expand_inputs([str(tmp_path / "x.parquet")]))[0] == texts


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
