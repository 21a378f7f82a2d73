"""How a configuration field is declared, and the error that every configuration rule raises."""

from __future__ import annotations

import dataclasses
import enum
import itertools
import math
from collections.abc import Callable, Collection, Iterable
from typing import Any


class InPhases(enum.Enum):
    """What a run with phases makes of one of its fields.

    Attributes:
        FIXED: The field holds for the whole run.
        CHANGED: A phase may give the field another value.
        REPLACED: The field describes the one phase of a run without phases; phases say it instead.
    """

    FIXED = enum.auto()
    CHANGED = enum.auto()
    REPLACED = enum.auto()


class ConfigError(ValueError):
    """A run that cannot be: the message names the rule, the values, the field and the way out."""


def option(default: Any = dataclasses.MISSING, *, help: str, choices: Collection[str] = (), nargs: str = "",
           flag: str = "", most: float | None = None, in_phases: InPhases = InPhases.FIXED,
           read: Callable[[Any], Any] | None = None) -> Any:
    """Declare a dataclass field that is also a command-line flag.

    Args:
        default: The field's default value.
        help: One line for `--help`, with the unit.
        choices: Allowed values, if there are few.
        nargs: argparse's nargs, for fields of several texts.
        flag: Flag name without dashes where it differs from the field's.
        most: Largest value of a number where it is not that of every other (`values.py`).
        in_phases: What becomes of the field in a run with phases.
        read: Reader of the field's values; None: its annotation says how they are read (`values.py`).
    """
    metadata = {"help": help, "choices": choices, "nargs": nargs, "flag": flag, "most": most, "in_phases": in_phases,
                "read": read}
    return dataclasses.field(default=default, metadata=metadata)


def names_in_phases(section: Any, kind: InPhases) -> tuple[str, ...]:
    """Name the fields of a section, a class, of which phases make the same."""
    return tuple(field.name for field in dataclasses.fields(section) if field.metadata["in_phases"] is kind)


def require_finite(section: Any) -> None:
    """Check every float field of a section.

    Raises:
        ConfigError: one is infinite or not a number.
    """
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{field.name}={value} must be a finite number")


def all_divisors(number: int) -> list[int]:
    """Every divisor of a positive number, in ascending order."""
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return small + [number // divisor for divisor in reversed(small) if divisor * divisor != number]


def nearest(candidates: Iterable[int], is_accepted: Callable[[int], bool], *, near: int, count: int = 3) -> str:
    """The candidates nearest to a value that would do in its place, for the end of a message: "4 or 8".

    Args:
        candidates: Values to suggest, if they are accepted.
        is_accepted: Whether a run with the value would be; the value's own rules and those of what it meets.
        near: The value that was refused.
        count: Most values that the words name.

    Returns:
        Words; empty if none is accepted.
    """
    ordered = sorted(set(candidates), key=lambda value: (abs(value - near), value))
    return in_words(sorted(itertools.islice(filter(is_accepted, ordered), count)))


def in_words(values: Iterable[object]) -> str:
    """Values as a choice: "2, 4 or 8"."""
    words = [str(value) for value in values]
    return " or ".join([", ".join(words[:-1])] * bool(words[:-1]) + words[-1:])


def divisors(number: int, *, near: int = 1, count: int = 3) -> str:
    """The divisors of `number` nearest to `near`, for the end of an error message: "4 or 8"."""
    return nearest(all_divisors(number), lambda _: True, near=near, count=count)
