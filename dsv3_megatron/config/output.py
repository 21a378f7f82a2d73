"""What a command writes: JSON that every reader takes, and files whose place is looked at before the work.

Usage:
    require_output_file("--png", options.png, ending=".png")     # before anything that takes time
    print(json_text(result))
"""

from __future__ import annotations

import errno
import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsv3_megatron.config.fields import ConfigError


def json_text(value: Any, **options: Any) -> str:
    """JSON that any reader takes: what is infinite or not a number, which JSON cannot say, is null.

    Args:
        value: Plain values.
        options: Keyword arguments handed on to `json.dumps`.
    """
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(finite(value), allow_nan=False, **options)


def finite(value: Any, nonfinite: list[str] | None = None, name: str = "") -> Any:
    """Plain values with None in place of every number that is not finite.

    Args:
        value: Plain values.
        nonfinite: Gets the names of such numbers, as in "losses.1".
        name: Name of `value` itself.
    """
    def child(key: Any) -> str:
        return f"{name}.{key}" if name else str(key)

    if isinstance(value, Mapping):
        return {str(key): finite(item, nonfinite, child(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item, nonfinite, child(index)) for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        if nonfinite is not None:
            nonfinite.append(name)
        return None
    return value


def require_output_file(flag: str, path: str | os.PathLike[str] | None, *, ending: str = "") -> None:
    """Check, before the work whose result goes there, that a file can be written. Nothing is left behind.

    Args:
        flag: The flag that named the file, for the message.
        path: The file; None or "": nothing to check.
        ending: Suffix that the file's name must have; "": any.

    Raises:
        ConfigError: another ending; no such folder, or no right to write into it; a folder is in the file's place.
    """
    if not path:
        return
    file = Path(path)
    if not file.name.endswith(ending):
        raise ConfigError(f"{flag}={path} must end with {ending}")
    try:
        if file.is_dir():
            raise ConfigError(f"{flag}={path} is a folder; name a file in it")
        if file.exists():
            if file.is_file():  # opened for writing, not written to
                os.close(os.open(file, os.O_WRONLY))
            return
        folder = Path(os.path.realpath(file)).parent
        if not folder.is_dir():
            if folder.exists():
                raise ConfigError(f"{flag}={path}: {folder} is a file, not a folder; give another place")
            raise ConfigError(f"{flag}={path}: the folder {folder} does not exist; make it first")
        if len(os.fsencode(file.name)) > os.pathconf(folder, "PC_NAME_MAX"):
            raise ConfigError(f"{flag}={path}: the name is too long; give a shorter one")
        with tempfile.TemporaryFile(dir=folder):  # without a name where the file system can
            pass
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{flag}={path!r} is not a name that a file can have ({error})") from error
    except OSError as error:
        raise ConfigError(f"{flag}={path}: it cannot be written ({os.strerror(error.errno or errno.EIO)}); give "
                          "another place") from error
