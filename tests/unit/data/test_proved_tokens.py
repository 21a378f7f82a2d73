"""Blocks of a dataset's tokens, proved when they are first read."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_megatron.data.checksums import ALGORITHM, DamagedFileError, checksum_of
from dsv3_megatron.data.indexed import sums_path
from dsv3_megatron.data.indexed_writer import DatasetWriter
from dsv3_megatron.data.proved_tokens import SUMS_BLOCK_BYTES, BlockSums, ProvedTokens
from tests.signing import change_sidecar

BLOCK = SUMS_BLOCK_BYTES // 2  # tokens of uint16


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    with DatasetWriter(tmp_path / "d", vocab_size=1000) as writer:
        ids = np.random.default_rng(0).integers(0, 1000, 3 * BLOCK + 5)
        writer.add_documents(ids, np.array([BLOCK, 2 * BLOCK + 5]))
    return str(tmp_path / "d")


def damage(path: str, at: int) -> None:
    with open(path, "r+b") as stream:
        stream.seek(at)
        byte = stream.read(1)[0]
        stream.seek(at)
        stream.write(bytes([byte ^ 4]))


def test_damage_is_found_where_it_is_read(prefix: str) -> None:
    whole = np.fromfile(f"{prefix}.bin", np.uint16)
    assert (ProvedTokens(prefix).read(0, len(whole)) == whole).all()
    damage(f"{prefix}.bin", 2 * SUMS_BLOCK_BYTES + 17)
    tokens = ProvedTokens(prefix)
    assert (tokens.read(5, 2 * BLOCK) == whole[5: 2 * BLOCK]).all()
    assert (tokens.read(3 * BLOCK, 3 * BLOCK + 5) == whole[3 * BLOCK:]).all()
    for first, stop in ((2 * BLOCK - 1, 2 * BLOCK + 1), (3 * BLOCK - 1, 3 * BLOCK), (0, 3 * BLOCK + 5)):
        with pytest.raises(DamagedFileError, match=rf"d\.bin is damaged: the {SUMS_BLOCK_BYTES} bytes from offset "
                                                   f"{2 * SUMS_BLOCK_BYTES} on do not have their checksum"):
            tokens.read(first, stop)
    with pytest.raises(DamagedFileError):
        ProvedTokens(prefix).require_all()
    assert len(ProvedTokens(prefix, is_verified=False).read(0, len(whole))) == len(whole)


def test_checksums_that_are_missing_or_damaged(prefix: str) -> None:
    damage(sums_path(prefix), 1)
    with pytest.raises(DamagedFileError, match="offset 0 on"):
        ProvedTokens(prefix).read(0, 1)
    os.truncate(sums_path(prefix), 8)
    with pytest.raises(DamagedFileError, match=r"d\.sums is damaged: it has 8 bytes, .*--verify-files none"):
        ProvedTokens(prefix)
    os.unlink(sums_path(prefix))
    with pytest.raises(DamagedFileError, match=r"d\.sums is damaged: it is missing"):
        ProvedTokens(prefix)
    change_sidecar(prefix, sums_algorithm="md5")
    with pytest.raises(DamagedFileError, match="it holds checksums by 'md5', which is unknown here"):
        ProvedTokens(prefix)
    os.unlink(f"{prefix}.json")  # of another tool: read as it is
    assert len(ProvedTokens(prefix).read(0, 5)) == 5


@given(st.lists(st.integers(0, 3 * SUMS_BLOCK_BYTES), max_size=6))
def test_checksums_do_not_depend_on_the_pieces(sizes: list[int]) -> None:
    data = os.urandom(sum(sizes))
    sums, made, at = BlockSums(ALGORITHM), b"", 0
    for size in sizes:
        made += sums.update(data[at: at + size])
        at += size
    made += sums.last()
    digits = [checksum_of(data[start: start + SUMS_BLOCK_BYTES]) for start in range(0, len(data), SUMS_BLOCK_BYTES)]
    assert made == b"".join(int(text, 16).to_bytes(len(text) // 2, "little") for text in digits)
