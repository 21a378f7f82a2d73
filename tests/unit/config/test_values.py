"""What a given value becomes as a field's value."""

from __future__ import annotations

from typing import Any

import pytest

from dsv3_megatron.config.load import parse_command
from dsv3_megatron.config.presets import preset


@pytest.mark.parametrize(("name", "text"), [
    ("a.toml", "train_iters = 1e3\n"), ("a.yaml", "train_iters: 1e3\n"), ("a.yaml", "train_iters: 1.0e+3\n"),
    ("a.json", '{"train_iters": 1000.0}'), ("a.json", '{"training": {"train_iters": "1e3"}}')])
def test_a_whole_number_may_be_written_with_an_exponent(name: str, text: str, file: Any) -> None:
    """In a file, in a phase and on the command line alike."""
    assert parse_command(["--config", file(text, name)]).run == preset("tiny").override(train_iters=1000)
    assert parse_command(["--train-iters", "1e3"]).run == preset("tiny").override(train_iters=1000)
    (phase,) = parse_command(["--config", file('[[phases]]\nname = "a"\ntrain_iters = 1e3\n')]).run.training.phases
    assert phase.train_iters == 1000 and isinstance(phase.train_iters, int)


@pytest.mark.parametrize(("name", "text"), [
    ("a.toml", 'data_path = "a b/c"\n'), ("a.yaml", "data_path: a b/c\n"), ("a.json", '{"data_path": "a b/c"}')])
def test_a_text_where_a_list_is_wanted_is_one_of_its_items(name: str, text: str, file: Any) -> None:
    run = parse_command(["--config", file(text, name)]).run
    assert run.data.data_path == ("a b/c",) == parse_command(["--data-path", "a b/c"]).run.data.data_path
    phases = file('[[phases]]\nname = "a"\ntrain_iters = 1\ndata_path = "a b/c"\n')
    assert parse_command(["--config", phases]).run.training.phases[0].data_path == ("a b/c",)


@pytest.mark.parametrize("name", ["a.toml", "a.json"])
def test_none_is_nothing_in_a_file_as_on_the_command_line(name: str, file: Any) -> None:
    """TOML has no other way to write it."""
    text = {"a.toml": 'q_lora_rank = "none"\nsave = "None"\n', "a.json": '{"q_lora_rank": null, "save": "none"}'}[name]
    run = parse_command(["--config", file(text, name)]).run
    assert (run.model.q_lora_rank, run.checkpoint.save) == (None, None)
