"""Fields that are flags, and the words in which an error tells what would do."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_megatron.config.fields import ConfigError, all_divisors, divisors, in_words, nearest, option, require_finite


@dataclasses.dataclass
class Section:
    rate: float = option(0.5, help="A rate.")
    names: tuple[str, ...] = option(("a",), help="Names.", nargs="+")
    count: int = option(2, help="A count.", choices=("2", "3"), flag="number", most=9)


def test_a_field_carries_what_its_flag_says():
    fields = {field.name: field for field in dataclasses.fields(Section)}
    expected = {"help": "A count.", "choices": ("2", "3"), "nargs": "", "flag": "number", "most": 9}
    assert expected.items() <= fields["count"].metadata.items()
    assert fields["names"].metadata["nargs"] == "+"


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_numbers_are_finite(value):
    require_finite(Section())
    with pytest.raises(ConfigError, match=f"rate={value} must be a finite number"):
        require_finite(Section(rate=value))


@given(st.integers(1, 2000))
def test_divisors_are_those_that_divide(number):
    assert all_divisors(number) == [value for value in range(1, number + 1) if number % value == 0]


@pytest.mark.parametrize(("values", "expected"), [([], ""), ([4], "4"), ([4, 8], "4 or 8"), ([2, 4, 8], "2, 4 or 8")])
def test_in_words(values, expected):
    assert in_words(values) == expected


def test_the_nearest_that_would_do():
    assert divisors(256, near=6) == "2, 4 or 8"
    assert divisors(256, near=6, count=2) == "4 or 8"
    assert nearest(range(1, 20), lambda value: value % 5 == 0, near=11) == "5, 10 or 15"
    assert nearest([3, 3, 9], lambda _: True, near=5, count=1) == "3"
    assert nearest(range(9), lambda _: False, near=1) == ""
