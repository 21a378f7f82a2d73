"""The groups of one process, for this library's side of a comparison."""

from tests.parity.conftest import groups

__all__ = ["groups"]
