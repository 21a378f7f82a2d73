"""Files whose checksums are made of the bytes in hand: in any order of reading and writing, none read for nothing."""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from dsv3_megatron.data import checksums, hashed_files
from dsv3_megatron.data.checksums import BlockVerifier, DamagedFileError, FileChecksums
from dsv3_megatron.data.hashed_files import HashedFile, ProvedFile

BLOCK = 4096
CONTENT = random.Random(3).randbytes(5 * BLOCK + 1000)


def by_zlib(content: bytes) -> FileChecksums:
    """Checksums as the format has them, made without the code under test."""
    digits = "".join(f"{zlib.crc32(content[at: at + BLOCK]):08x}" for at in range(0, len(content), BLOCK))
    return FileChecksums("crc32", BLOCK, len(content), digits)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 4096 bytes, pieces of 1000, CRC-32 for what is written."""
    monkeypatch.setattr(hashed_files, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(hashed_files, "PIECE_BYTES", 1000)
    monkeypatch.setattr(hashed_files, "_MOST_OPEN", 2)
    for name in ("new_checksum", "digits_of", "checksum_of"):
        original = getattr(checksums, name)
        monkeypatch.setattr(hashed_files, name, lambda *given, original=original: original(*given[:1], "crc32")
                            if original.__name__ != "new_checksum" else original("crc32"))
    monkeypatch.setattr(hashed_files, "ALGORITHM", "crc32")


@pytest.fixture
def num_read() -> Iterator[list[int]]:
    """Bytes of each read from a file."""
    real, found = os.preadv, list[int]()

    def read(descriptor: int, views: list[memoryview], offset: int) -> int:
        count = real(descriptor, views, offset)
        found.append(count)
        return count

    with mock.patch("os.preadv", read):
        yield found


def ranges(rng: random.Random, *, in_order: bool) -> list[tuple[int, int]]:
    """Cuts of the whole content."""
    cuts = sorted({0, len(CONTENT), *(rng.randrange(len(CONTENT)) for _ in range(12))})
    found = list(zip(cuts, cuts[1:], strict=False))
    if not in_order:
        rng.shuffle(found)
    return found


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_reading_gives_the_bytes_and_proves_them(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    (tmp_path / "a").write_bytes(CONTENT)
    verifier = BlockVerifier(tmp_path / "a", by_zlib(CONTENT))
    with ProvedFile(tmp_path / "a", verifier) as file:
        for start, stop in [*ranges(rng, in_order=False), *ranges(rng, in_order=False)]:
            data = bytearray(stop - start)
            file.read_into(start, data)
            assert data == CONTENT[start:stop]
            assert b"".join(map(bytes, file.pieces(start, stop - start))) == CONTENT[start:stop]
    assert all(verifier.is_proved(block) for block in range(6))


@pytest.mark.parametrize("seed", range(40))
def test_a_flipped_bit_in_a_block_that_is_read_in_part_is_found(tmp_path: Path, seed: int) -> None:
    """Whatever the order, by the end at the latest; blocks that nobody reads are not looked at."""
    rng = random.Random(seed)
    at = rng.randrange(len(CONTENT))
    changed = bytearray(CONTENT)
    changed[at] ^= 1 << rng.randrange(8)
    (tmp_path / "a").write_bytes(changed)
    some = rng.sample(ranges(rng, in_order=False), 4)
    is_touched = any(start // BLOCK <= at // BLOCK <= (stop - 1) // BLOCK for start, stop in some)

    def read() -> None:
        with ProvedFile(tmp_path / "a", BlockVerifier(tmp_path / "a", by_zlib(CONTENT))) as file:
            for start, stop in some:
                file.read_into(start, bytearray(stop - start))

    if is_touched:
        with pytest.raises(DamagedFileError, match=f"bytes from offset {at // BLOCK * BLOCK} on do not have") as caught:
            read()
        assert caught.value.offset == at // BLOCK * BLOCK
    else:
        read()


def test_what_is_read_in_order_is_read_once(tmp_path: Path, num_read: list[int]) -> None:
    (tmp_path / "a").write_bytes(CONTENT)
    with ProvedFile(tmp_path / "a", BlockVerifier(tmp_path / "a", by_zlib(CONTENT))) as file:
        for start, stop in ranges(random.Random(1), in_order=True):
            file.read_into(start, bytearray(stop - start))
    assert sum(num_read) == len(CONTENT)
    num_read.clear()
    with ProvedFile(tmp_path / "a", BlockVerifier(tmp_path / "a", by_zlib(CONTENT))) as file:
        for at in range(0, BLOCK, 512):  # two blocks in turns
            file.read_into(at, bytearray(512))
            file.read_into(3 * BLOCK + at, bytearray(512))
    assert sum(num_read) == 2 * BLOCK


def test_a_file_that_ends_before(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(CONTENT[:9000])
    with pytest.raises(DamagedFileError, match="it ends at byte 9000, 21480 were written"), \
            ProvedFile(tmp_path / "a", BlockVerifier(tmp_path / "a", by_zlib(CONTENT))) as file:
        file.read_into(8500, bytearray(10))  # the rest of its block is not there
    with ProvedFile(tmp_path / "a", None) as file, pytest.raises(EOFError, match="a ends at byte 9000"):
        file.read_into(8990, bytearray(11))


def test_another_error_is_not_hidden_by_the_proof(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(len(CONTENT)))
    with pytest.raises(KeyError, match="mine"), \
            ProvedFile(tmp_path / "a", BlockVerifier(tmp_path / "a", by_zlib(CONTENT))) as file:
        file.read_into(0, bytearray(10))
        raise KeyError("mine")


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("in_order", [True, False])
def test_what_is_written_has_its_checksums(tmp_path: Path, num_read: list[int], seed: int, in_order: bool) -> None:
    rng = random.Random(seed)
    with HashedFile(tmp_path / "a") as file:
        for start, stop in ranges(rng, in_order=in_order):
            file.write(start, CONTENT[start:stop])
        file.write(len(CONTENT), b"")
        if rng.random() < 0.5:  # some bytes again
            file.write(BLOCK, CONTENT[BLOCK: BLOCK + 10])
            in_order = False
        assert file.checksums() == by_zlib(CONTENT)
    assert (tmp_path / "a").read_bytes() == CONTENT
    if in_order:
        assert not num_read


def test_bytes_that_are_written_over_have_the_later_checksum(tmp_path: Path) -> None:
    changed = CONTENT[:100] + b"other" + CONTENT[105:]
    with HashedFile(tmp_path / "a") as file:
        file.write(0, CONTENT)
        assert file.checksums() == by_zlib(CONTENT)
        file.write(100, b"other")
        assert file.checksums() == by_zlib(changed)


def test_what_was_there_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(CONTENT)
    with HashedFile(tmp_path / "a") as file:
        assert file.checksums() == by_zlib(b"")
        file.write(0, b"abc")
        file.flush()
    assert (tmp_path / "a").read_bytes() == b"abc"
