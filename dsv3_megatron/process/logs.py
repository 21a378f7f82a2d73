"""Sets up the log lines of a process of a run."""

from __future__ import annotations

import logging

__all__ = ["configure_logging"]


def configure_logging(rank: int) -> None:
    """Rank 0 says what was chosen; the others only warn."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("dsv3_megatron").setLevel(logging.INFO if rank == 0 else logging.WARNING)
