"""Whatever a field is given, in a file, a phase, on the command line or in Python: a run, or a ConfigError."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsv3_megatron.config.fields import ConfigError, all_divisors
from dsv3_megatron.config.load import build_parser, parse_command, read_config_file
from dsv3_megatron.config.phases import Phase
from dsv3_megatron.config.presets import preset
from dsv3_megatron.config.run import SECTIONS, RunConfig

FIELDS = [field for cls in SECTIONS.values() for field in dataclasses.fields(cls)]
FLAGS = {action.dest: action.option_strings[0] for action in build_parser()._actions}
ODD: tuple[Any, ...] = (
    0, 1, -1, 2, 3, 7, 2**31 - 1, 2**31, 2**32, 2**63, 10**30, -(10**30), 10**400, 0.0, -0.0, 0.5, 1e3, 1e-320, 5e-324,
    1e300, -1e300, math.inf, -math.inf, math.nan, True, False, None, "", " ", "none", "1e3", "-1", "1e999999999",
    "a b/c", "a\0b", "\udcff", "x" * 5000, [], ["a"], [None], [[1]], {}, {"a": 1})
# What a run with phases does not have.
ALONE = [name for name in FLAGS if name in {field.name for field in FIELDS}]


def _make(run: RunConfig) -> None:
    """Everything that is worked out of a run before anything is allocated."""
    run.validate(1)
    recipe = run.recipe()
    assert recipe.step(0, 0) is not None
    assert recipe.num_steps >= 1
    run.as_dict()
    np.random.RandomState(run.training.seed)  # what shuffles the data takes no other


@pytest.mark.parametrize("value", ODD, ids=[repr(value)[:20] for value in ODD])
def test_any_field_in_a_file(value: Any, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    for field in FIELDS:
        path.write_text(json.dumps({field.name: value}), encoding="utf-8")
        try:
            _make(preset("tiny").override(**read_config_file(str(path))))
        except ConfigError as error:
            assert len(str(error)) < 1000 + len(str(value)), field.name


@pytest.mark.parametrize("value", ODD, ids=[repr(value)[:20] for value in ODD])
def test_any_field_of_a_phase(value: Any, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    for name in [field.name for field in dataclasses.fields(Phase)]:
        for base in ({"train_iters": 5}, {"train_tokens": 10**6}):
            second = {"name": "b", **base, "rope_type": "yarn", "original_max_position_embeddings": 256, name: value}
            path.write_text(json.dumps({"phases": [{"name": "a", "train_iters": 5}, second]}), encoding="utf-8")
            try:
                _make(preset("tiny").override(**read_config_file(str(path))))
            except ConfigError as error:
                assert str(error), name


@pytest.mark.parametrize("word", ["0", "-1", "1e3", "1" * 5000, "1e-320", "inf", "nan", "", "none", "a b/c", "1_000",
                                  "\u0661"], ids=lambda word: repr(word)[:20])
def test_any_field_on_the_command_line(word: str) -> None:
    for name in ALONE:
        try:
            _make(parse_command([f"{FLAGS[name]}={word}"]).run)
        except ConfigError as error:
            assert str(error), name


@pytest.mark.parametrize("value", ODD, ids=[repr(value)[:20] for value in ODD])
def test_any_field_in_python(value: Any) -> None:
    for field in FIELDS:
        try:
            _make(preset("tiny").override(**{field.name: value}))
        except ConfigError as error:
            assert str(error), field.name


NUMBERS = st.one_of(st.integers(-3, 300), st.integers(), st.floats(), st.sampled_from(ODD))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from([field.name for field in FIELDS]), NUMBERS, min_size=1, max_size=4))
def test_several_fields_at_once(values: dict[str, Any]) -> None:
    try:
        _make(preset("tiny").override(**values))
    except ConfigError:
        return


@given(st.integers(1, 3000))
def test_divisors_are_those_that_divide(number: int) -> None:
    assert all_divisors(number) == [divisor for divisor in range(1, number + 1) if number % divisor == 0]
