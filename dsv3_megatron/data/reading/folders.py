"""The files of a folder, all levels, links followed; what is left out is counted with its reason."""

from __future__ import annotations

import os
import re
import stat
from collections import Counter

# What Spark, Hive, Delta and their kin leave beside the data. Names with a dot in front are hidden anyway.
_MARKERS = re.compile(r"_(SUCCESS|FAILURE|metadata|common_metadata|temporary|delta_log|symlink_format_manifest)"
                      r"|_(started|committed)_.*")  # fmt: skip


def is_marker(path: str) -> bool:
    """Whether a file or folder is no data by its name."""
    return _MARKERS.fullmatch(os.path.basename(path)) is not None


def walk_files(path: str) -> tuple[list[str], Counter[str]]:
    """The regular files below a folder, sorted by path, and how many entries were left out, by reason.

    Links to folders are followed; a folder that is reached a second time, in a loop of links say, is left out.

    Raises:
        ValueError: a link leads nowhere, or in circles.
        OSError: a folder cannot be listed.
    """
    files: list[str] = []
    left_out: Counter[str] = Counter()
    seen = {_identity(os.stat(path))}
    waiting = [path]
    while waiting:
        for entry in sorted(os.scandir(waiting.pop()), key=lambda entry: entry.name):
            if entry.name.startswith("."):
                left_out["hidden"] += 1
                continue
            if is_marker(entry.name):
                left_out["a marker such as _SUCCESS"] += 1
                continue
            try:
                found = entry.stat()
            except FileNotFoundError:
                target = os.readlink(entry.path)
                raise ValueError(f"input {entry.path} is a link to {target}, which is not there: mend it") from None
            if stat.S_ISDIR(found.st_mode):
                if _identity(found) in seen:
                    left_out["a folder reached twice by links"] += 1
                    continue
                seen.add(_identity(found))
                waiting.append(entry.path)
            elif stat.S_ISREG(found.st_mode):
                files.append(entry.path)
            else:
                left_out["a pipe or device"] += 1
    return sorted(files), left_out


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino
