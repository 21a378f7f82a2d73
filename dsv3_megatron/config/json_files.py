"""JSON that others wrote, read within bounds: a small file cannot take all memory, nor end in an error of another kind.

Every module that reads a JSON file reads it here. Bounds are looked at before memory is taken:

    bytes        64 MB, or what DSV3_MAX_JSON_MB says (a checkpoint of 10 TB describes itself in 42); 1 MB for a file of
                 settings, or what DSV3_MAX_CONFIG_MB says
    containers   4 million lists and objects, which take 20 times their text in memory
    nesting      as deep as Python's parser goes, which is about a thousand
    digits       4300 of a whole number, Python's own bound
"""

from __future__ import annotations

import json
import os
from typing import Any

MAX_JSON, MAX_CONFIG = "DSV3_MAX_JSON_MB", "DSV3_MAX_CONFIG_MB"
_DEFAULT_MB = {MAX_JSON: 64, MAX_CONFIG: 1}
_MAX_CONTAINERS = 4_000_000


def max_bytes(variable: str = MAX_JSON) -> int:
    """The largest file of a kind that is read, in bytes.

    Args:
        variable: Name of the environment's variable that says it in megabytes: MAX_JSON or MAX_CONFIG.

    Raises:
        ValueError: the variable is not a whole number from 1 to 100000.
    """
    text = os.environ.get(variable, str(_DEFAULT_MB[variable]))
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:9]) <= 100_000:
        raise ValueError(f"{variable}={text!r} must be a whole number from 1 to 100000; set it so, or unset it")
    return int(text) * 1_000_000


def read_json(path: str | os.PathLike[str]) -> Any:
    """The value in a JSON file.

    Raises:
        ValueError: the file is not JSON in UTF-8, or beyond a bound; the message does not name it.
        OSError: the file cannot be read.
    """
    return parse_json(_read_bounded(path, MAX_JSON))


def parse_json(text: str | bytes | bytearray, **options: Any) -> Any:
    """The value of a JSON text.

    Args:
        text: The text; bytes are UTF-8.
        options: Keyword arguments handed on to `json.loads`.

    Raises:
        ValueError: the text is not JSON, or is beyond a bound.
    """
    if not isinstance(text, str):
        text = text.decode("utf-8")  # json would take UTF-16 and lone surrogates too
    num_containers = text.count("[") + text.count("{")
    if num_containers > _MAX_CONTAINERS:
        raise ValueError(f"it has {num_containers:,} opening brackets; at most {_MAX_CONTAINERS:,} are read")
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: the file holds something else, or `read_json` refuses it.
        OSError: the file cannot be read.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"it must hold a JSON object, not a {type(content).__name__}")
    return content


def object_without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object for `json.loads(object_pairs_hook=...)`, of whose names each must be there once.

    Raises:
        ValueError: a name is there twice.
    """
    name = first_repeated(pairs)
    if name is not None:
        raise ValueError(f"{name!r} is given twice in one object")
    return dict(pairs)


def first_repeated(pairs: list[tuple[str, Any]]) -> str | None:
    """The first name of an object's that is there more than once; None: each is there once."""
    if len(dict(pairs)) == len(pairs):
        return None
    names = [name for name, _ in pairs]
    return next(name for name in names if names.count(name) > 1)


def is_plain_name(name: Any) -> bool:
    """Whether a name out of a file is that of a file in the same folder: no path, no step upwards, printable."""
    return isinstance(name, str) and name not in ("", ".", "..") and "/" not in name and "\\" not in name \
        and name.isprintable()


def read_text_file(path: str | os.PathLike[str]) -> str:
    """The text of a file of settings, of at most DSV3_MAX_CONFIG_MB (1) megabytes.

    Raises:
        ValueError: the file is longer, or is not UTF-8.
        OSError: the file cannot be read.
    """
    return _read_bounded(path, MAX_CONFIG).decode("utf-8-sig")


def _read_bounded(path: str | os.PathLike[str], variable: str) -> bytes:
    most = max_bytes(variable)
    with open(path, "rb") as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it has more than {most:,} bytes, the most that is read of a file of this kind; set "
                         f"{variable} (megabytes) if it is what it should be")
    return content
