"""Numbers of a JSON file, as floats or whole numbers."""

import pytest

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.json_numbers import typed_number


@pytest.mark.parametrize(("value", "is_float", "expected"), [(3, False, 3), (3.0, False, 3), (3, True, 3.0),
                                                             (0.5, True, 0.5), (-2, False, -2)])
def test_a_number(value, is_float, expected):
    found = typed_number("theta", value, is_float, "config.json")
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(("value", "is_float", "message"), [
    (3.5, False, "config.json: theta=3.5 must be a whole number"), (True, False, "theta=True must be a whole number"),
    ("3", True, "theta='3' must be a number"), (None, True, "theta=None must be a number")])
def test_what_is_no_number(value, is_float, message):
    with pytest.raises(ConfigError, match=message):
        typed_number("theta", value, is_float, "config.json")
