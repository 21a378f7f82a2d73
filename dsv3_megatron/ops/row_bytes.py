"""Bytes of a row of values where it travels between ranks. No torch."""

from __future__ import annotations

# Kernels read and write rows in pieces of so many bytes.
ALIGNMENT = 16
GATE_BYTES = 4
_TILE, _SCALE_BYTES = 128, 4


def record_bytes(width: int) -> int:
    """Bytes of a row of `width` values in FP8: a byte each, and a scale for each 128 of them."""
    return width + _SCALE_BYTES * -(-width // _TILE)


def gated_bytes(row_bytes: int, gate_bytes: int = GATE_BYTES) -> int:
    """Bytes that a row of `row_bytes` takes with its gate behind it."""
    return -(-(row_bytes + gate_bytes) // ALIGNMENT) * ALIGNMENT
