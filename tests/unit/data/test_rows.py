"""Rows to score: every token of a dataset once, and what is refused of an array of ids."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_megatron.data.indexed_writer import DatasetWriter
from dsv3_megatron.data.proved_tokens import ProvedTokens
from dsv3_megatron.data.rows import Windows, open_token_array, open_windows


@given(st.integers(2, 60), st.integers(1, 70))
def test_windows_predict_every_token_but_the_first_once(num_tokens: int, length: int) -> None:
    tokens_T = np.arange(num_tokens)
    with tempfile.TemporaryDirectory() as folder:
        with DatasetWriter(f"{folder}/d", vocab_size=num_tokens) as writer:
            writer.add_documents(tokens_T, np.array([num_tokens]))
        windows = Windows(ProvedTokens(f"{folder}/d"), length)
    rows = [windows[index] for index in range(len(windows))]
    assert np.concatenate([row[1:] for row in rows]).tolist() == list(range(1, num_tokens))
    assert all(row[0] == row[1] - 1 for row in rows), "a row starts with the token before its first prediction"
    assert all(len(row) == length + 1 for row in rows[:-1]) and 2 <= len(rows[-1]) <= length + 1
    with pytest.raises(IndexError):
        windows[len(windows)]


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    prefix = str(tmp_path / "valid")
    with DatasetWriter(prefix, vocab_size=50) as writer:
        writer.add_documents(np.arange(20), np.array([5, 0, 15]))
    return prefix


def test_windows_of_a_dataset_cross_its_documents(dataset: str) -> None:
    windows = open_windows(dataset + ".bin", length=8, vocab_size=50)
    assert [windows[index].tolist() for index in range(len(windows))] == [
        list(range(9)), list(range(8, 17)), list(range(16, 20))]


@pytest.mark.parametrize("length, vocab_size, message", [
    (20, 50, r"valid has 20 tokens, fewer than one sequence of seq_length \+ 1 = 21: use more data, or a seq_length of "
     "at most 19"),
    (8, 49, "vocabulary of the data .50. larger than the model's .49."),
])
def test_datasets_that_are_refused(dataset: str, length: int, vocab_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_windows(dataset, length=length, vocab_size=vocab_size)


def test_a_dataset_of_another_tokenizer(tmp_path: Path) -> None:
    prefix = str(tmp_path / "valid")
    with DatasetWriter(prefix, vocab_size=50, tokenizer_fingerprint="a" * 64) as writer:
        writer.add_documents(np.arange(20), np.array([20]))
    assert len(open_windows(prefix, length=8, vocab_size=50, tokenizer_fingerprint="a" * 64)) == 3
    with pytest.raises(ValueError, match="made by tokenizer a{12}, the run's tokenizer_model is b{12}"):
        open_windows(prefix, length=8, vocab_size=50, tokenizer_fingerprint="b" * 64)


def test_a_missing_dataset(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data file .*none.idx does not exist"):
        open_windows(str(tmp_path / "none"), length=8, vocab_size=50)


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint16", ">i4"])
def test_an_array_of_ids(tmp_path: Path, dtype: str) -> None:
    ids = np.arange(12).reshape(3, 4).astype(dtype)
    np.save(tmp_path / "ids.npy", ids)
    found = open_token_array(tmp_path / "ids.npy", vocab_size=12, max_length=4)
    assert isinstance(found, np.memmap) and np.array_equal(found, ids)


@pytest.mark.parametrize("ids, message", [
    (np.zeros((2, 4), np.float32), "dtype float32; token ids must be integers"),
    (np.zeros((2, 4), bool), "dtype bool; token ids must be integers"),
    (np.zeros(4, np.int64), r"shape \[4\]; it must be \[batch, seq\]"),
    (np.zeros((2, 4, 1), np.int64), r"shape \[2, 4, 1\]"),
    (np.zeros((0, 4), np.int64), r"shape \[0, 4\].*at least one row"),
    (np.zeros((2, 1), np.int64), r"shape \[2, 1\].*at least two tokens"),
    (np.zeros((2, 17), np.int64), "rows of 17 tokens; they must not exceed the model's max_position_embeddings=16"),
    (np.array([[0, 11], [3, -1]]), r"id -1 in row 1, position 1 must lie in 0..11 \(the model's vocab_size=12\)"),
    (np.array([[0, 12], [3, 1]], np.uint16), "id 12 in row 0, position 1 must lie in 0..11"),
    (np.array([[{}, 1]], dtype=object), "is not an array in .npy format .*Python objects"),
])
def test_arrays_that_are_refused(tmp_path: Path, ids: np.ndarray, message: str) -> None:
    np.save(tmp_path / "ids.npy", ids, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        open_token_array(tmp_path / "ids.npy", vocab_size=12, max_length=16)


def test_a_wrong_id_far_into_a_large_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dsv3_megatron.data import rows

    monkeypatch.setattr(rows, "_CHECKED_BYTES", 64)
    ids = np.zeros((40, 4), np.int64)
    ids[33, 2] = 99
    np.save(tmp_path / "ids.npy", ids)
    with pytest.raises(ValueError, match="id 99 in row 33, position 2"):
        open_token_array(tmp_path / "ids.npy", vocab_size=12, max_length=16)


@pytest.mark.parametrize("content", [b"", b"1 2 3\n", b"\x93NUMPY\x01\x00"], ids=["empty", "text", "truncated"])
def test_files_that_are_no_array(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "ids.npy"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="is not an array in .npy format"):
        open_token_array(file, vocab_size=12, max_length=16)


def test_an_archive_and_a_missing_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "ids.npz", ids=np.zeros((2, 2), np.int64))
    with pytest.raises(ValueError, match="is an archive of arrays"):
        open_token_array(tmp_path / "ids.npz", vocab_size=12, max_length=16)
    with pytest.raises(ValueError, match="none.npy: no such file; write ids"):
        open_token_array(tmp_path / "none.npy", vocab_size=12, max_length=16)
