"""The cores that this process may use."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["usable_cores"]

_CGROUP = Path("/sys/fs/cgroup")


def usable_cores(cgroup: Path = _CGROUP) -> int:
    """Cores of this process's mask, and no more than its control group's share of time (a container's), at least 1.

    OMP_NUM_THREADS says how many threads a process starts, not how many cores there are, and does not count here.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    quota = _quota(cgroup)
    return max(1, min(cores, quota) if quota is not None else cores)


def _quota(cgroup: Path) -> int | None:
    """Cores' worth of time that the control group has, rounded up; None without a limit."""
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            words = " ".join((cgroup / file).read_text(encoding="ascii") for file in files).split()
        except OSError:
            continue  # the other version of control groups, or none
        if len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]):
            return -(-int(words[0]) // int(words[1]))
    return None
