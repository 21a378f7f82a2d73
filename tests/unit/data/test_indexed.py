"""The dataset format: the same bytes as Megatron-Core's builder, and nothing half written."""

import hashlib
import json
import os
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from dsv3_megatron.data.indexed import choose_dtype, read_header, read_sidecar
from dsv3_megatron.data.indexed_writer import DatasetWriter
from tests.unit.data.datasets_written import damage, read_pair, write

VOCAB_SIZES = st.sampled_from([1, 300, 65499, 65500, 129280, 2**31])


@st.composite
def datasets(draw):
    vocab_size = draw(VOCAB_SIZES)
    ids = st.integers(0, vocab_size - 1)
    return vocab_size, draw(st.lists(st.lists(ids, max_size=12), max_size=12)), draw(st.integers(1, 5))


def write_with_megatron(prefix, vocab_size, documents):
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab_size))
    for document in documents:
        builder.add_document(document, [len(document)] if document else [])
    builder.finalize(f"{prefix}.idx")


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(datasets())
def test_bytes_are_megatron_cores(tmp_path, dataset):
    vocab_size, documents, batch = dataset
    ours, theirs = os.fspath(tmp_path / "ours"), os.fspath(tmp_path / "theirs")
    write(ours, vocab_size, documents, batch, is_overwrite_allowed=True)
    write_with_megatron(theirs, vocab_size, documents)
    assert read_pair(ours) == read_pair(theirs)
    header = read_header(ours)
    assert header.dtype == choose_dtype(vocab_size) == np.dtype(DType.optimal_dtype(vocab_size))
    assert (header.num_sequences, header.num_documents) == (sum(map(bool, documents)), len(documents))
    assert header.num_tokens == sum(map(len, documents))
    sidecar = read_sidecar(ours)
    assert [sidecar.bin_sha256, sidecar.idx_sha256] == [hashlib.sha256(part).hexdigest() for part in read_pair(ours)]
    assert (sidecar.num_tokens, sidecar.num_documents) == (header.num_tokens, header.num_documents)
    assert sidecar.max_token_id == max((token for document in documents for token in document), default=-1)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(datasets())
def test_megatron_core_reads_it(tmp_path, dataset):
    vocab_size, documents, batch = dataset
    if not any(documents):
        return  # Megatron-Core cannot map an empty .bin
    prefix = os.fspath(tmp_path / "d")
    write(prefix, vocab_size, documents, batch, is_overwrite_allowed=True)
    data = IndexedDataset(prefix)
    assert [data[i].tolist() for i in range(len(data))] == [document for document in documents if document]
    bounds = data.document_indices
    spans = [data[int(a) : int(b)] if b > a else [] for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    assert [[token for part in span for token in part.tolist()] for span in spans] == documents


def test_sidecar_keeps_what_it_is_given(tmp_path):
    write(tmp_path / "d", 10, [[1, 2], []], tokenizer_fingerprint="abc", options={"append_eod": True})
    sidecar = read_sidecar(tmp_path / "d")
    content = json.loads((tmp_path / "d.json").read_text())
    assert content.pop("signature").startswith(("xxh3_64:", "crc32:"))
    assert asdict(sidecar) == content
    assert (sidecar.tokenizer_fingerprint, sidecar.options) == ("abc", {"append_eod": True})
    assert (sidecar.vocab_size, sidecar.dtype, sidecar.num_documents, sidecar.num_sequences) == (10, "uint16", 2, 1)
    (tmp_path / "d.json").write_text('{"version": 7}')
    with pytest.raises(
        ValueError, match=r"d.json is not a dataset's sidecar \(version 7, this release reads 1 and 2\): make"
    ):
        read_sidecar(tmp_path / "d")
    (tmp_path / "d.json").unlink()
    assert read_sidecar(tmp_path / "d") is None


def test_vocab_size_limits(tmp_path):
    for vocab_size in (0, 2**31 + 1):
        with pytest.raises(ValueError, match=rf"vocab_size={vocab_size} must lie in 1\.\.2147483648"):
            DatasetWriter(tmp_path / "d", vocab_size=vocab_size)


@pytest.mark.parametrize(
    ("suffix", "change", "message"),
    [
        (".idx", lambda raw: b"NOT" + raw[3:], "is not a Megatron-Core index (wrong magic bytes); make it again with"),
        (".idx", lambda raw: raw[:20], "is not a Megatron-Core index (wrong magic bytes); make it again with"),
        (".idx", lambda raw: raw[:9] + b"\x02" + raw[10:], "has version 2 and dtype code 8, not 1 and 1..8; make it"),
        (".idx", lambda raw: raw[:-1], "has 81 bytes, its header says 82; make it again with"),
        (".bin", lambda raw: raw[:-2], "has 6 bytes, its index says 8 (4 tokens of uint16); the two files belong to"),
    ],
)
def test_damaged_files_are_refused(tmp_path, suffix, change, message):
    write(tmp_path / "d", 10, [[1, 2, 3], [4]])
    damage(tmp_path / f"d{suffix}", change)
    with pytest.raises(ValueError) as error:
        read_header(tmp_path / "d")
    assert str(error.value).startswith(f"{tmp_path / 'd'}{suffix} {message}")


@pytest.mark.parametrize("missing", ["bin", "idx"])
def test_missing_file_says_where_and_how(tmp_path, missing):
    write(tmp_path / "d", 10, [[1]])
    (tmp_path / f"d.{missing}").unlink()
    with pytest.raises(ValueError) as error:
        read_header(tmp_path / "d")
    text = str(error.value)
    assert text.startswith(f"data file {tmp_path}/d.{missing} does not exist (data_path={tmp_path}/d: the prefix")
    assert "make it with: dsv3 preprocess --input FILE.jsonl" in text
