"""Checksums of files by block: each kind of damage is found with its offset, and a part of a file is proved alone."""

from __future__ import annotations

import io
import random
import zlib
from pathlib import Path

import pytest

from dsv3_megatron.data import checksums as module
from dsv3_megatron.data.checksums import (
    BLOCK_BYTES,
    BlockHasher,
    BlockVerifier,
    ChecksumStream,
    DamagedFileError,
    checksum_file,
    damages,
    read_checksums,
)

ALGORITHMS = sorted(module._MAKERS)
CONTENT = random.Random(1).randbytes(3 * 4096 + 1000)


def checksums_of(content: bytes, algorithm: str = "crc32") -> module.FileChecksums:
    hasher = BlockHasher(algorithm, 4096)
    hasher.update(content)
    return hasher.result()


def test_blocks_are_those_of_the_content() -> None:
    """Held against zlib, block by block."""
    expected = "".join(f"{zlib.crc32(CONTENT[start: start + 4096]):08x}" for start in range(0, len(CONTENT), 4096))
    assert checksums_of(CONTENT).digits == expected


def test_xxh3_is_the_librarys() -> None:
    xxhash = pytest.importorskip("xxhash", reason="an environment from before xxhash was a dependency")
    assert checksums_of(CONTENT, "xxh3_64").of_block(1) == xxhash.xxh3_64_hexdigest(CONTENT[4096:8192])
    assert module.ALGORITHM == "xxh3_64"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("sizes", [[1], [4096], [4095, 2], [5000, 1, 10000]])
def test_the_pieces_do_not_matter(algorithm: str, sizes: list[int]) -> None:
    hasher = BlockHasher(algorithm, 4096)
    position = 0
    while position < len(CONTENT):
        for size in sizes:
            hasher.update(CONTENT[position: position + size])
            position += size
    assert hasher.result() == checksums_of(CONTENT, algorithm)


def test_a_stream_has_the_checksums_of_its_file(tmp_path: Path) -> None:
    with open(tmp_path / "a", "wb") as raw:
        stream = ChecksumStream(raw)
        for part in (CONTENT[:5], CONTENT[5:9000], memoryview(CONTENT)[9000:]):
            assert stream.write(part) == len(part)
        assert stream.tell() == len(CONTENT)
        stream.flush()
    assert stream.checksums() == checksum_file(tmp_path / "a") and (tmp_path / "a").read_bytes() == CONTENT
    empty = ChecksumStream(io.BytesIO()).checksums()
    assert (empty.num_bytes, empty.num_blocks, empty.digits) == (0, 0, "")


def test_a_stream_that_writes_a_part_alone_is_an_error() -> None:
    class Narrow(io.BytesIO):
        def write(self, data: object) -> int:
            return super().write(memoryview(data)[:3])  # type: ignore[call-overload]

    stream = ChecksumStream(Narrow())
    assert stream.write(b"abc") == 3
    with pytest.raises(OSError, match="a part of what was to be written was not"):
        stream.write(b"abcd")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_flipped_bit_is_found(algorithm: str, tmp_path: Path) -> None:
    known, file = checksums_of(CONTENT, algorithm), tmp_path / "a"
    rng = random.Random(2)
    for _ in range(200):
        bit = rng.randrange(8 * len(CONTENT))
        changed = bytearray(CONTENT)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
        start = bit // 8 // 4096 * 4096
        with pytest.raises(DamagedFileError, match=f"a is damaged: the .* bytes from offset {start} on") as caught:
            BlockVerifier(file, known).require(0, len(CONTENT))
        assert caught.value.offset == start
        if start:  # a part without it is proved
            BlockVerifier(file, known).require(0, start)


def test_a_part_is_proved_once(tmp_path: Path) -> None:
    file, known = tmp_path / "a", checksums_of(CONTENT)
    file.write_bytes(CONTENT)
    verifier = BlockVerifier(file, known)
    verifier.require(4000, 200)  # two blocks
    file.write_bytes(bytes(len(CONTENT)))
    verifier.require(0, 8192)
    with pytest.raises(DamagedFileError, match="from offset 8192 on"):
        verifier.require(8191, 2)
    verifier.require(9000, 0)


def test_cut_and_longer_files(tmp_path: Path) -> None:
    file, known = tmp_path / "a", checksums_of(CONTENT)
    file.write_bytes(CONTENT[:9000])
    with pytest.raises(DamagedFileError, match="it ends at byte 9000, 13288 were written"):
        BlockVerifier(file, known).require(0, len(CONTENT))
    file.write_bytes(CONTENT + b"x")
    (found,) = damages({"a": BlockVerifier(file, known)}, 2)
    assert found[0] == "a" and "has 13289 bytes, 13288 were written" in str(found[1])
    (tmp_path / "b").write_bytes(CONTENT)
    file.write_bytes(bytes(len(CONTENT)))
    both = {"b": BlockVerifier(tmp_path / "b", known), "a": BlockVerifier(file, known)}
    assert [(name, error.offset) for name, error in damages(both, 2)] == [("a", at) for at in (0, 4096, 8192, 12288)]


def test_what_is_written_down_is_checked() -> None:
    content = checksums_of(CONTENT).as_dict()
    assert read_checksums(content) == checksums_of(CONTENT)
    for change, message in (
            ({"algorithm": "md5"}, "checksums by 'md5' are unknown; known are crc32, xxh3_64"),
            ({"block_bytes": 0}, "cannot be"), ({"block_bytes": 1 << 40}, "cannot be"),
            ({"num_bytes": -1}, "cannot be"),
            ({"num_bytes": "5"}, "cannot be"), ({"blocks": "00"}, "2 digits of checksums for 4 blocks"),
            ({"blocks": None}, "0 digits"), ({"num_bytes": 10**15}, "for 244140625000 blocks")):
        with pytest.raises(ValueError, match=message):
            read_checksums(content | change)
    assert BLOCK_BYTES == 4 << 20
