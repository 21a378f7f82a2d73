"""Random numbers that belong to a document: a keyed hash of its text, the key made of a seed and a purpose.

Two documents of equal text get equal numbers under an equal seed, whichever worker, order, container or shard they come
in; another seed or another purpose gives numbers that have nothing to do with these. Nothing is remembered between
documents, so a transform that draws from here is a pure function.
"""

from __future__ import annotations

import hashlib

_NUMBER_BYTES = 8
NUMBER_RANGE = 1 << (8 * _NUMBER_BYTES)  # every number is uniform on 0 .. NUMBER_RANGE - 1
_MAX_SEED = (1 << 64) - 1


def check_probability(name: str, value: float) -> None:
    """Refuse what is no probability, NaN included.

    Raises:
        ValueError: value is not in 0..1; the message names the field.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{name}={value} must be a probability, between 0 and 1; try 0.1")


def threshold_of(probability: float) -> int:
    """The number below which a draw counts as a success: draws < threshold have this probability (1 is certain)."""
    return round(probability * NUMBER_RANGE)


class DocumentRandom:
    """Draws uniform 64-bit numbers for one purpose; cheap to make, picklable.

    The numbers are SHAKE-256 of BLAKE2b-512(key, UTF-8 text), eight bytes each, little-endian: as many as a document
    needs, and the first k are the same however many are drawn. The key is BLAKE2b of "purpose:seed".

    Args:
        seed: 0 .. 2**64 - 1.
        purpose: Keeps the numbers of one transform apart from those of another under the same seed.

    Raises:
        ValueError: the seed is out of range.
    """

    def __init__(self, seed: int, purpose: str) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= _MAX_SEED:
            raise ValueError(f"seed={seed} must be an integer between 0 and 2**64 - 1; try 1234")
        self._key = hashlib.blake2b(f"{purpose}:{seed}".encode(), digest_size=64).digest()

    def draw_bytes(self, document: str | bytes, count: int) -> bytes:
        """`count` numbers of eight bytes each, little-endian, for a document given as text or as its UTF-8 bytes."""
        data = document.encode("utf-8") if isinstance(document, str) else document
        digest = hashlib.blake2b(data, key=self._key).digest()
        return hashlib.shake_256(digest).digest(count * _NUMBER_BYTES)

    def draw(self, document: str | bytes, count: int) -> list[int]:
        """Draw `count` of a document's numbers, integers in 0 .. NUMBER_RANGE - 1."""
        data = self.draw_bytes(document, count)
        return [int.from_bytes(data[i : i + _NUMBER_BYTES], "little") for i in range(0, len(data), _NUMBER_BYTES)]
