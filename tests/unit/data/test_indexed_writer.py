"""The writer of datasets: Megatron-Core's bytes, what it refuses, and going on from a state."""

import hashlib
import os

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from dsv3_megatron.data.indexed import read_header, read_sidecar
from dsv3_megatron.data.indexed_writer import DatasetWriter, WriterState
from tests.unit.data.datasets_written import damage, read_pair, write


def test_torch_tensors_through_add_item_agree(tmp_path):
    documents = [[5, 6, 7], [8], [9, 1]]
    builder = IndexedDatasetBuilder(os.fspath(tmp_path / "t.bin"), dtype=np.uint16)
    for document in documents:
        builder.add_item(torch.tensor(document))
        builder.end_document()
    builder.finalize(os.fspath(tmp_path / "t.idx"))
    write(tmp_path / "o", 10, documents)
    assert read_pair(tmp_path / "o") == read_pair(tmp_path / "t")


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
    assert read_pair(tmp_path / "d") == before and len(list(tmp_path.iterdir())) == 4
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
    ("suffix", "change", "message"),
    [
        (
            "bin",
            lambda raw: raw[:-1],
            r"d\.bin has 5 bytes where 6 were written, after a crash of the machine, say: start over",
        ),
        *(
            (
                suffix,
                lambda raw: b"\x07" + raw[1:],
                rf"d\.{suffix} is not what was written, after a crash of the machine, say: start over",
            )
            for suffix in ("bin", "lengths", "documents")
        ),
    ],
)
def test_a_state_that_the_files_do_not_bear_out_is_refused(tmp_path, suffix, change, message):
    folder = tmp_path / "work"
    writer = DatasetWriter(tmp_path / "d", vocab_size=10, folder=os.fspath(folder))
    writer.add_documents(np.array([1, 2, 3]), np.array([3]))
    state = writer.state()
    hashes = [hashlib.sha256(np.array(values, dtype).tobytes()).hexdigest()
              for values, dtype in (([1, 2, 3], np.uint16), ([3], np.int32), ([1], np.int32))]
    assert state == WriterState(1, 1, 3, 3, *hashes)
    writer.close()
    damage(folder / f"d.{suffix}", change)
    with pytest.raises(ValueError, match=message):
        DatasetWriter(tmp_path / "d", vocab_size=10, folder=os.fspath(folder), state=state)
