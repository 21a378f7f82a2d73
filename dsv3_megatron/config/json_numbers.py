"""Numbers of a `config.json`, whose JSON may write a whole number as a float and the other way round."""

from __future__ import annotations

from typing import Any

from dsv3_megatron.config.fields import ConfigError


def typed_number(name: str, value: Any, is_float: bool, source: str) -> Any:
    """The value as a float or as a whole number.

    Args:
        name: Name of the setting, for the message.
        value: The setting's value as the file has it.
        is_float: A float is wanted, not a whole number.
        source: What to call the file in messages.

    Raises:
        ConfigError: the value is no number, a whole number is asked for and it has a fraction, or it is not finite.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and is_float:
        return float(value)
    if is_number and float(value).is_integer():
        return int(value)
    raise ConfigError(f"{source}: {name}={value!r} must be a {'' if is_float else 'whole '}number")
