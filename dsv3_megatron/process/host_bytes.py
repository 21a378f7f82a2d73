"""Memory of this machine as far as this process may use it: control groups count, as Slurm and containers set them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["free_host_bytes", "host_bytes"]

_CONTROL_GROUPS = Path("/sys/fs/cgroup")


def host_bytes() -> int | None:
    """Memory of this machine, or of a control group that this process is in where that is less; None: unknown."""
    try:
        have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
    return min([have, *(limit for limit, _folder in _limits())])


def free_host_bytes(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Memory that this process could still take, without what the kernel would give up for it; None: unknown.

    Args:
        meminfo: The kernel's table of memory.
    """
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    for limit, folder in _limits():
        used = _number(folder / "memory.current")
        statistics = _lines(folder / "memory.stat")
        # Files that were read or written and are not in use count as used, and make room when it is needed.
        spare = sum(int(line.split()[1]) for line in statistics if line.startswith("inactive_file "))
        if used is not None:
            free = min(free, limit - used + spare)
    return max(0, free)


def _limits() -> Iterator[tuple[int, Path]]:
    """Limits of the control groups (version 2) that this process is in, with the folder of each."""
    own = next((line.strip()[3:] for line in _lines(Path("/proc/self/cgroup")) if line.startswith("0::")), "/")
    group = _CONTROL_GROUPS / own.lstrip("/")
    for folder in (group, *group.parents):
        limit = _number(folder / "memory.max")
        if limit is not None:
            yield limit, folder
        if folder == _CONTROL_GROUPS:
            return


def _number(path: Path) -> int | None:
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].strip().isdecimal() else None


def _lines(path: Path) -> list[str]:
    """Lines of a small file of the kernel's; none if it is not there."""
    try:
        return path.read_text(encoding="ascii").splitlines()
    except OSError:
        return []
