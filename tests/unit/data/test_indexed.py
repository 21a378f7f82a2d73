"""The dataset format: the same bytes as Megatron-Core's builder, and nothing half written."""

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from dsv3_megatron.data.indexed import choose_dtype, dataset_paths, read_header, read_sidecar
from dsv3_megatron.data.indexed_writer import DatasetWriter, WriterState

VOCAB_SIZES = st.sampled_from([1, 300, 65499, 65500, 129280, 2**31])


@st.composite
def datasets(draw):
    vocab_size = draw(VOCAB_SIZES)
    ids = st.integers(0, vocab_size - 1)
    return vocab_size, draw(st.lists(st.lists(ids, max_size=12), max_size=12)), draw(st.integers(1, 5))


def write(prefix, vocab_size, documents, batch=100, **keywords):
    with DatasetWriter(prefix, vocab_size=vocab_size, **keywords) as writer:
        for start in range(0, len(documents), batch):
            part = documents[start : start + batch]
            ids = np.array([token for document in part for token in document], dtype=np.int64)
            writer.add_documents(ids, np.array([len(document) for document in part]))


def write_with_megatron(prefix, vocab_size, documents):
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab_size))
    for document in documents:
        builder.add_document(document, [len(document)] if document else [])
    builder.finalize(f"{prefix}.idx")


def read_pair(prefix):
    return [Path(path).read_bytes() for path in dataset_paths(prefix)[:2]]


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


def test_torch_tensors_through_add_item_agree(tmp_path):
    documents = [[5, 6, 7], [8], [9, 1]]
    builder = IndexedDatasetBuilder(os.fspath(tmp_path / "t.bin"), dtype=np.uint16)
    for document in documents:
        builder.add_item(torch.tensor(document))
        builder.end_document()
    builder.finalize(os.fspath(tmp_path / "t.idx"))
    write(tmp_path / "o", 10, documents)
    assert read_pair(tmp_path / "o") == read_pair(tmp_path / "t")


def test_sidecar_keeps_what_it_is_given(tmp_path):
    write(tmp_path / "d", 10, [[1, 2], []], tokenizer_fingerprint="abc", options={"append_eod": True})
    sidecar = read_sidecar(tmp_path / "d")
    assert asdict(sidecar) == json.loads((tmp_path / "d.json").read_text())
    assert (sidecar.tokenizer_fingerprint, sidecar.options) == ("abc", {"append_eod": True})
    assert (sidecar.vocab_size, sidecar.dtype, sidecar.num_documents, sidecar.num_sequences) == (10, "uint16", 2, 1)
    (tmp_path / "d.json").write_text('{"version": 7}')
    with pytest.raises(
        ValueError, match=r"d.json is not a dataset's sidecar \(version 7, this release reads 1\): make"
    ):
        read_sidecar(tmp_path / "d")
    (tmp_path / "d.json").unlink()
    assert read_sidecar(tmp_path / "d") is None


@pytest.mark.parametrize("bad", [-1, 10, 70000])
def test_id_that_does_not_fit(tmp_path, bad):
    writer = DatasetWriter(tmp_path / "d", vocab_size=10)
    with pytest.raises(ValueError) as error, writer:
        writer.add_documents(np.array([1, 2, 3]), np.array([3]))
        writer.add_documents(np.array([4, 5, bad]), np.array([1, 0, 2]))
    assert str(error.value) == (
        f"{tmp_path / 'd'}: token id {bad} of document 3 does not fit: ids must lie in 0..9 (vocab_size=10, stored as "
        "uint16); use the tokenizer that made the ids"
    )
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_kept_unless_told(tmp_path):
    write(tmp_path / "d", 10, [[1]])
    before = read_pair(tmp_path / "d")
    message = r"output .*/d\.bin exists: pass --overwrite to replace it, or another --output-prefix"
    with pytest.raises(ValueError, match=message):
        DatasetWriter(tmp_path / "d", vocab_size=10)
    with pytest.raises(RuntimeError), DatasetWriter(tmp_path / "d", vocab_size=10, is_overwrite_allowed=True) as writer:
        writer.add_documents(np.array([7]), np.array([1]))
        raise RuntimeError
    assert read_pair(tmp_path / "d") == before and len(list(tmp_path.iterdir())) == 3
    write(tmp_path / "d", 10, [[2, 3]], is_overwrite_allowed=True)
    assert read_pair(tmp_path / "d") != before and read_header(tmp_path / "d").num_tokens == 2


@pytest.mark.parametrize("failing_call", [1, 2, 3])
def test_nothing_is_left_when_publishing_fails(tmp_path, monkeypatch, failing_call):
    calls = 0
    real_replace = os.replace

    def replace(source, target):
        nonlocal calls
        calls += 1
        if calls == failing_call:
            raise OSError("disk on fire")
        real_replace(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="disk on fire"):
        write(tmp_path / "d", 10, [[1]])
    assert list(tmp_path.iterdir()) == []


def test_vocab_size_limits(tmp_path):
    for vocab_size in (0, 2**31 + 1):
        with pytest.raises(ValueError, match=rf"vocab_size={vocab_size} must lie in 1\.\.2147483648"):
            DatasetWriter(tmp_path / "d", vocab_size=vocab_size)


def damage(path, change):
    path.write_bytes(change(path.read_bytes()))


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


def encoded(documents):
    """Documents of several sequences as the encoder hands them over."""
    sequences = [sequence for document in documents for sequence in document]
    ids = np.array([token for sequence in sequences for token in sequence], np.uint16).tobytes()
    lengths = np.array([len(sequence) for sequence in sequences], np.int32)
    counts = np.array([len(document) for document in documents], np.int32)
    largest = max((token for sequence in sequences for token in sequence), default=-1)
    return [ids[:3], ids[3:]], lengths, counts, largest


def test_documents_of_several_sequences_are_megatron_cores(tmp_path):
    documents = [[[1, 2], [3]], [], [[4, 5, 6]], [[7], [8], [9]]]
    with DatasetWriter(tmp_path / "ours", vocab_size=10) as writer:
        pieces, lengths, counts, largest = encoded(documents)
        writer.add_encoded(pieces, lengths, counts, max_token_id=largest)
    builder = IndexedDatasetBuilder(os.fspath(tmp_path / "theirs.bin"), dtype=np.uint16)
    for document in documents:
        builder.add_document([token for part in document for token in part], [len(part) for part in document])
    builder.finalize(os.fspath(tmp_path / "theirs.idx"))
    assert read_pair(tmp_path / "ours") == read_pair(tmp_path / "theirs")
    assert read_sidecar(tmp_path / "ours").max_token_id == 9


def test_writing_goes_on_from_a_state(tmp_path):
    first, second = [[[1, 2], [3]], []], [[[4, 5, 6]]]
    folder = os.fspath(tmp_path / "work")
    writer = DatasetWriter(tmp_path / "d", vocab_size=10, folder=folder)
    pieces, lengths, counts, largest = encoded(first)
    writer.add_encoded(pieces, lengths, counts, max_token_id=largest)
    state = writer.state()
    pieces, lengths, counts, largest = encoded([[[9, 9]]])  # lost: the state is from before
    writer.add_encoded(pieces, lengths, counts, max_token_id=largest)
    writer.close()
    with DatasetWriter(tmp_path / "d", vocab_size=10, folder=folder, state=state) as writer:
        pieces, lengths, counts, largest = encoded(second)
        writer.add_encoded(pieces, lengths, counts, max_token_id=largest)
    with DatasetWriter(tmp_path / "at_once", vocab_size=10) as writer:
        pieces, lengths, counts, largest = encoded(first + second)
        writer.add_encoded(pieces, lengths, counts, max_token_id=largest)
    assert read_pair(tmp_path / "d") == read_pair(tmp_path / "at_once")
    assert read_sidecar(tmp_path / "d") == read_sidecar(tmp_path / "at_once")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda raw: raw[:-1],
            r"d\.bin has 5 bytes where 6 were written, after a crash of the machine, say: start over",
        ),
        (
            lambda raw: b"\x07" + raw[1:],
            r"d\.bin is not what was written, after a crash of the machine, say: start over",
        ),
    ],
)
def test_a_state_that_the_files_do_not_bear_out_is_refused(tmp_path, change, message):
    folder = tmp_path / "work"
    writer = DatasetWriter(tmp_path / "d", vocab_size=10, folder=os.fspath(folder))
    writer.add_documents(np.array([1, 2, 3]), np.array([3]))
    state = writer.state()
    assert state == WriterState(1, 1, 3, 3, hashlib.sha256(np.array([1, 2, 3], np.uint16).tobytes()).hexdigest())
    writer.close()
    damage(folder / "d.bin", change)
    with pytest.raises(ValueError, match=message):
        DatasetWriter(tmp_path / "d", vocab_size=10, folder=os.fspath(folder), state=state)
