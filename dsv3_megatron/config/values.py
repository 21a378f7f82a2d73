"""The one reader of values: what a given one becomes as a field's, in files, phases, on the command line, in Python.

    annotation of the field     taken
    bool                        true, false
    int                         5, 5.0, 1e3, and the text of such a number (YAML 1.1 reads 1e3 as text)
    float                       0.1, 1, and the text of such a number
    str                         text that is not empty
    tuple[str, ...]             a list of texts and numbers; a text alone is a list of one, spaces and all
    ... | None                  also null and the text "none", any case
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from decimal import Decimal, InvalidOperation
from typing import Any

from dsv3_megatron.config.fields import ConfigError

KINDS: dict[str, type] = {"bool": bool, "int": int, "float": float, "str": str, "tuple[str, ...]": tuple}
_WORDS: dict[type, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "text",
                           tuple: "a list of texts"}
# What no field of that type goes beyond unless its own declaration says so: sizes are 32-bit in the libraries below.
_MOST_INT = 2**31 - 1
_MOST_FLOAT = 1e12


def is_optional(annotation: str) -> bool:
    """Whether a field of this annotation may be None."""
    return annotation.endswith("| None")


def kind_of(annotation: str) -> type:
    """bool, int, float, str or tuple, of texts: what a field's annotation says its values are."""
    return KINDS[annotation.removesuffix(" | None")]


def read_field(field: dataclasses.Field, value: Any) -> Any:
    """Read a value, as it is written in a file, in a phase or as a flag's word, as a field of a section.

    Raises:
        ConfigError: the value is of another type; the message names the field, the value and what it must be.
    """
    read = field.metadata.get("read")
    return read(value) if read else read_value(field.name, value, str(field.type))


def hold_tuples(section: Any) -> None:
    """Make tuples of the lists that a new section was given, so that it hashes and nobody changes it.

    Raises:
        ConfigError: a field with a reader of its own cannot be read.
    """
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if field.metadata["read"]:
            object.__setattr__(section, field.name, field.metadata["read"](value))
        elif isinstance(value, list):
            object.__setattr__(section, field.name, tuple(value))


def plain(value: Any) -> Any:
    """A field's value as files have it: tuples as lists."""
    return list(value) if isinstance(value, tuple) else value


def read_value(name: str, value: Any, annotation: str) -> Any:
    """Read a written value as what an annotation says; `read_field` does it for a field.

    Raises:
        ConfigError: the value is of another type; the message names the field, the value and what it must be.
    """
    kind = kind_of(annotation)
    if is_optional(annotation) and (value is None or (isinstance(value, str) and value.lower() == "none")):
        return None
    read = _as_kind(value, kind)
    if read is None:
        optional = " or nothing" if is_optional(annotation) else ""
        raise ConfigError(f"{name}={_shown(value)} must be {_WORDS[kind]}{optional}")
    return read


def whole_number(text: str | float) -> int | None:
    """The integer that a number, or its text such as "1000", "1e3" or "1000.0", stands for; None where it is none."""
    if isinstance(text, float):
        return int(text) if math.isfinite(text) and text.is_integer() else None
    try:
        number = Decimal(text)
    except (InvalidOperation, ValueError):
        return None
    # Beyond 10^30 nothing is meant, and 1e999999999 would be written out digit by digit.
    if not number.is_finite() or number.adjusted() > 30 or number != number.to_integral_value():
        return None
    return int(number)


def require_values(section: Any) -> None:
    """Check the type of every field of a section of a run or of a phase, and that no number is beyond all use.

    Raises:
        ConfigError: one is of another type, an empty text, or larger than the field's declaration allows.
    """
    for field in dataclasses.fields(section):
        annotation, value = str(field.type), getattr(section, field.name)
        if annotation.removesuffix(" | None") not in KINDS or (value is None and is_optional(annotation)):
            continue
        kind: type = kind_of(annotation)
        if isinstance(value, bool) != (kind is bool) or not isinstance(value, (int, float) if kind is float else kind):
            raise ConfigError(f"{field.name}={_shown(value)} must be {_WORDS[kind]}")
        texts = value if isinstance(value, tuple) else [value] if isinstance(value, str) else []
        for text in texts:
            _require_text(field.name, text, field.metadata.get("choices", ()))
        if isinstance(value, int | float) and kind is not bool:
            most = field.metadata.get("most") or (_MOST_INT if kind is int else _MOST_FLOAT)
            if abs(value) > most and not (isinstance(value, float) and math.isinf(value)):
                raise ConfigError(f"{field.name}={_shown(value)} must not {'be below -' if value < 0 else 'exceed '}"
                                  f"{most}")


def _require_text(name: str, text: Any, choices: Collection[str]) -> None:
    if not isinstance(text, str):
        raise ConfigError(f"{name}={_shown(text)} must be text")
    if not text.strip() and not choices and name != "name":
        raise ConfigError(f"{name} is an empty text; leave it out, or give it a value (in a shell: is the variable "
                          "that it comes from set?)")
    if "\0" in text:
        raise ConfigError(f"{name}={_shown(text)} has a zero byte in it, which no path and no name can have")


def _as_kind(value: Any, kind: type) -> Any:
    """The value as a bool, int, float, text or tuple of texts; None where it is none."""
    if kind is bool:
        return value if isinstance(value, bool) else None
    if isinstance(value, bool):
        return None
    if kind is int:
        return value if isinstance(value, int) else whole_number(value) if isinstance(value, float | str) else None
    if kind is float:
        return _as_float(value)
    if kind is str:
        return value if isinstance(value, str) else None
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list | tuple) or not all(
            isinstance(item, str | int | float) and not isinstance(item, bool) for item in value):
        return None
    return tuple(map(str, value))


def _as_float(value: Any) -> float | None:
    if not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None
    except OverflowError:  # an integer of hundreds of digits
        return math.inf


def _shown(value: Any) -> str:
    """A value as Python writes it, not longer than a message can be."""
    try:
        text = repr(value)
    except ValueError:  # Python does not write integers of thousands of digits
        return f"an integer of {value.bit_length()} bits"
    return text if len(text) <= 200 else f"{text[:200]}..."
