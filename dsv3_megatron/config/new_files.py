"""Files that get their name all at once: made under another one, then renamed. On an error the old file stays.

In a folder that others may write to, somebody could have put a link under the other name, so that we would write over a
file of ours. Therefore what stands there is removed, a link and not what it leads to, and the file is made with O_EXCL:
if somebody is quicker, this is an error. A folder of unfinished work is gone on with only if this user made it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from dsv3_megatron.config.fields import ConfigError

PARTIAL = ".partial"


def open_new(path: str | os.PathLike[str], mode: str = "wb", **options: Any) -> IO[Any]:
    """Open a file for writing that is made now; a file, or a link, that has its name is removed before.

    Args:
        path: The file.
        mode: Mode of `open`: "wb", "w+b" or "w".
        options: Keyword arguments handed on to `open`, such as the encoding.

    Raises:
        OSError: the file cannot be made, a folder has its name, or somebody else makes a file of this name.
    """
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    return open(path, mode, opener=_make, **options)


def _make(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], mode: str = "wb", *, is_durable: bool = False, is_shared: bool = False,
              **options: Any) -> Iterator[IO[Any]]:
    """Open a file for writing that takes the place of another one when the block ends; on an error nothing of it stays.

    Args:
        path: Final name. Until then the file is PATH.partial.
        mode: Mode of `open`: "wb" or "w".
        is_durable: Have the content on disk before it gets its name.
        is_shared: Several processes may write the file at once, so that each has a name of its own for it.
        options: Keyword arguments handed on to `open`, such as the encoding.

    Raises:
        OSError: the file cannot be written or renamed.
    """
    writer = f".{os.uname().nodename}.{os.getpid()}" if is_shared else ""
    partial = f"{os.fspath(path)}{writer}{PARTIAL}"
    try:
        with open_new(partial, mode, **options) as stream:
            yield stream
            if is_durable:
                stream.flush()
                os.fsync(stream.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise


def replace_text(path: str | os.PathLike[str], text: str, *, is_durable: bool = False, is_shared: bool = False) -> None:
    """Have a file hold a text in UTF-8, all of it or what it held before; arguments and errors are `replacing`'s."""
    with replacing(path, "w", is_durable=is_durable, is_shared=is_shared, encoding="utf-8") as stream:
        stream.write(text)


def require_own_folder(folder: str | os.PathLike[str]) -> None:
    """Refuse to go on in a folder of unfinished work that another user made, or that is a link.

    Args:
        folder: The folder, which exists.

    Raises:
        ConfigError: the folder is somebody else's, a link, or no folder.
        OSError: the folder cannot be looked at.
    """
    path = Path(folder)
    if path.is_symlink() or not path.is_dir():
        kind = "a link" if path.is_symlink() else "no folder"
        raise ConfigError(f"{path} is {kind}, where a folder of this user's would be: remove it, or choose another "
                          "output")
    owner = path.stat().st_uid
    if owner != os.geteuid():
        raise ConfigError(f"{path} was made by another user (uid {owner}, this one is {os.geteuid()}): have that user "
                          "finish the work in it, remove it, or choose another output")
