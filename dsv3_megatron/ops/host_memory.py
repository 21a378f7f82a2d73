"""Memory of large CPU tensors: freed blocks stay in the process.

glibc gives blocks above 32 MiB back to the kernel when they are freed, and trims the heap's end. A training step frees
and allocates the same large tensors over and over; each time the kernel zeroes every page again. A softmax of 33 MB
into a fresh tensor took 40 ms with the default settings and 11 ms with these (AVX2, one core).

Huge pages are not asked for: they made no step faster, and the first two slower (docs/results.md).
"""

from __future__ import annotations

import ctypes
import logging
import sys

logger = logging.getLogger(__name__)

# Parameter numbers of mallopt(3), from glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tell glibc not to return freed blocks to the kernel. Call once, before the first large tensor.

    Resident memory then stays at its peak. No effect on results.

    Returns:
        Whether it took effect; False (and a log line) where the C library has no `mallopt`.
    """
    if sys.platform != "linux":
        logger.info("freed host memory: default policy (not glibc)")
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        logger.info("freed host memory: default policy (C library without mallopt)")
        return False
    done = bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_INT)) and bool(mallopt(_M_TRIM_THRESHOLD, _LARGEST_INT))
    logger.info("freed host memory: %s", "kept for reuse" if done else "default policy (mallopt refused)")
    return done
