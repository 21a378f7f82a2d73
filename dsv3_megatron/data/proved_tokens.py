"""The tokens of a dataset, each block of 64 KiB proved by its checksum before the first id out of it is used.

PREFIX.sums has the checksum of each block of PREFIX.bin, one after the other, little-endian; the sidecar says by which
algorithm. A dataset of 10 TB has 1.2 GB of them. So nothing need be read before a run starts, and damage is found
where it is read, once a process. A dataset without PREFIX.sums, of another tool or an earlier release, is read as it
is.
"""

from __future__ import annotations

import math
import os

import numpy as np

from dsv3_megatron.data.checksums import DamagedFileError, checksum_of, is_known, num_digits
from dsv3_megatron.data.indexed import Sidecar, dataset_paths, read_header, read_sidecar, sums_path

_BLOCK_BITS = 16
SUMS_BLOCK_BYTES = 1 << _BLOCK_BITS


class ProvedTokens:
    """The ids of a .bin file by position, mapped into memory. Used by one thread.

    Args:
        prefix: Path of the dataset without suffix.
        is_verified: Whether blocks are compared with their checksums.

    Raises:
        DamagedFileError: a file is missing or damaged, or checksums need a package that is not installed.
    """

    def __init__(self, prefix: str | os.PathLike[str], *, is_verified: bool = True) -> None:
        header = read_header(prefix)
        self.path, self.dtype, self._item_bytes = dataset_paths(prefix)[0], header.dtype, header.dtype.itemsize
        self.tokens_T = (np.asarray(np.memmap(self.path, dtype=header.dtype, mode="r")) if header.num_tokens
                         else np.empty(0, header.dtype))
        self._bytes = memoryview(self.tokens_T.view(np.uint8))
        sidecar = read_sidecar(prefix) if is_verified else None
        self._algorithm = sidecar.sums_algorithm if sidecar is not None else ""
        self._sums = _map_sums(prefix, sidecar, len(self._bytes)) if sidecar is not None and self._algorithm else None
        num_blocks = math.ceil(len(self._bytes) / SUMS_BLOCK_BYTES)
        # A bit a block: 20 MB for 10 TB.
        self._is_proved = bytearray(-(-num_blocks // 8)) if self._sums is not None else None

    def __len__(self) -> int:
        return len(self.tokens_T)

    def read(self, first: int, stop: int) -> np.ndarray:
        """The ids at positions first to stop - 1, in the file's dtype, not copied.

        Raises:
            DamagedFileError: a block that holds one of them does not have its checksum.
        """
        proved = self._is_proved
        if proved is not None and stop > first:
            # Most reads lie in one block that is proved: every document of a run comes by here.
            block, last = first * self._item_bytes >> _BLOCK_BITS, stop * self._item_bytes - 1 >> _BLOCK_BITS
            if block != last or not proved[block >> 3] >> (block & 7) & 1:
                self._require(block, last)
        return self.tokens_T[first:stop]

    def require_all(self) -> None:
        """Prove every block; errors are those of `read`."""
        self.read(0, len(self))

    def _require(self, first: int, last: int) -> None:
        """Prove the blocks from one to another, those that the file has."""
        proved, sums = self._is_proved, self._sums
        assert proved is not None and sums is not None
        for block in range(first, min(last + 1, len(sums))):
            if proved[block >> 3] >> (block & 7) & 1:
                continue
            at = block * SUMS_BLOCK_BYTES
            part = self._bytes[at: at + SUMS_BLOCK_BYTES]
            if int(checksum_of(part, self._algorithm), 16) != int(sums[block]):
                raise DamagedFileError(self.path, at, f"the {len(part)} bytes from offset {at} on do not have their "
                                       f"checksum ({self._algorithm}); get it again, or make the dataset again")
            proved[block >> 3] |= 1 << (block & 7)


def _map_sums(prefix: str | os.PathLike[str], sidecar: Sidecar, num_bytes: int) -> np.ndarray:
    """The checksums of a dataset's blocks, unsigned [blocks]."""
    path, algorithm = sums_path(prefix), sidecar.sums_algorithm
    if not is_known(algorithm):
        raise DamagedFileError(path, 0, f"it holds checksums by {algorithm!r}, which is unknown here (xxh3_64 needs "
                               "the package xxhash: pip install xxhash)")
    dtype = np.dtype(f"<u{num_digits(algorithm) // 2}")
    wanted = math.ceil(num_bytes / SUMS_BLOCK_BYTES) * dtype.itemsize
    found = os.path.getsize(path) if os.path.isfile(path) else None
    if found != wanted:
        raise DamagedFileError(path, 0, f"{'it is missing' if found is None else f'it has {found} bytes'}, {wanted} "
                               "bytes of checksums were written: get it again, make the dataset again, or read it "
                               "without checksums (--verify-files none)")
    return np.asarray(np.memmap(path, dtype=dtype, mode="r")) if wanted else np.empty(0, dtype)


class BlockSums:
    """Makes the checksums of PREFIX.sums from bytes that come one after the other.

    Args:
        algorithm: "xxh3_64" or "crc32".
    """

    def __init__(self, algorithm: str) -> None:
        self.algorithm = algorithm
        self._dtype = np.dtype(f"<u{num_digits(algorithm) // 2}")
        self._rest = bytearray()

    def update(self, data: bytes | bytearray | memoryview) -> bytes:
        """Take in the next bytes; returns the checksums of the blocks that are complete with them."""
        view, made = memoryview(data).cast("B"), []
        if self._rest:
            room = SUMS_BLOCK_BYTES - len(self._rest)
            self._rest += view[:room]
            view = view[room:]
            if len(self._rest) < SUMS_BLOCK_BYTES:
                return b""
            made.append(checksum_of(self._rest, self.algorithm))
            self._rest = bytearray()
        whole = len(view) // SUMS_BLOCK_BYTES * SUMS_BLOCK_BYTES
        made += [checksum_of(view[at: at + SUMS_BLOCK_BYTES], self.algorithm)
                 for at in range(0, whole, SUMS_BLOCK_BYTES)]
        self._rest += view[whole:]
        return self._packed(made)

    def last(self) -> bytes:
        """The checksum of the last block, which is shorter; nothing if there is none."""
        return self._packed([checksum_of(self._rest, self.algorithm)] if self._rest else [])

    def _packed(self, digits: list[str]) -> bytes:
        return np.array([int(text, 16) for text in digits], self._dtype).tobytes()
