"""Memory of large CPU tensors: freed blocks stay in the process, and huge pages lie under them.

glibc gives blocks above 32 MiB back to the kernel when they are freed, and trims the heap's end. A training step frees
and allocates the same large tensors over and over; each time the kernel zeroes every page again. A softmax of 33 MB
into a fresh tensor took 40 ms with the default settings and 11 ms with these (AVX2, one core).

A page of 4 KiB is looked up in tables, which a virtual machine does twice. Under huge pages of 2 MiB there is hardly
anything to look up; docs/results.md has what that makes of a training step. Linux gives them to whom asks (`madvise`,
the usual setting), and torch asks where THP_MEM_ALLOC_ENABLE is 1.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from pathlib import Path

logger = logging.getLogger(__name__)

_VARIABLE = "THP_MEM_ALLOC_ENABLE"
_POLICY = Path("/sys/kernel/mm/transparent_hugepage/enabled")

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


def ask_for_huge_pages() -> bool:
    """Have torch ask the kernel for huge pages under tensors of 2 MiB and more. Call once, before the first of them.

    torch reads the environment's THP_MEM_ALLOC_ENABLE when it makes that tensor. What is set there already stays, so
    that THP_MEM_ALLOC_ENABLE=0 keeps huge pages away. No effect on results.

    Returns:
        Whether it will ask; False (and a log line) where the kernel has none, or the environment says otherwise.
    """
    try:
        policy = _POLICY.read_text(encoding="utf-8")
    except OSError:
        policy = "[never]"
    if "[never]" in policy:
        logger.info("huge pages: none (the kernel gives none)")
        return False
    value = os.environ.setdefault(_VARIABLE, "1")
    logger.info("huge pages: %s", "asked for" if value == "1" else f"none ({_VARIABLE}={value})")
    return value == "1"
