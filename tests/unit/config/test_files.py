"""Files of settings: formats, what is wrong in them, numbers and texts as YAML writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.load import parse_command, read_config_file
from dsv3_megatron.config.presets import preset

SAME = {
    "run.toml": 'preset = "laptop"\n[training]\nlr = 1\ntrain_iters = 7\n[data]\ndata_path = ["0.5", "a"]\n',
    "run.yaml": "preset: laptop\ntraining:\n  lr: 1\n  train_iters: 7\ndata:\n  data_path: [0.5, a]\n",
    "run.yml": "preset: laptop\nlr: 1e0\ntrain_iters: 7.0\ndata_path: [0.5, a]\n",
    "run.json": '{"preset": "laptop", "lr": 1, "training": {"train_iters": 7}, "data": {"data_path": ["0.5", "a"]}}',
}


@pytest.mark.parametrize("name", SAME)
def test_every_format_with_or_without_sections(name: str, file: Any) -> None:
    expected = preset("laptop").override(lr=1.0, train_iters=7, data_path=["0.5", "a"])
    run = parse_command(["--config", file(SAME[name], name)]).run
    assert run == expected and isinstance(run.training.lr, float)


def test_numbers_as_yaml_writes_them(file: Any) -> None:
    """YAML 1.1 reads 3e-4, without a point, as text."""
    assert yaml.safe_load("3e-4") == "3e-4"
    assert parse_command(["--config", file("lr: 3e-3\n", "run.yaml")]).run.training.lr == 3e-3


@pytest.mark.parametrize(("text", "name", "message"), [
    ("num_layer = 3\n", "a.toml", "num_layer is not a field of a run; did you mean num_layers or "),
    ("qqq = 3\n", "a.toml", "qqq is not a field of a run"),
    ("[trainning]\nlr = 0.1\n", "a.toml", "trainning is not a section of a run; they are model, parallel, training, "
                                          "data, checkpoint, logging"),
    ("model = 3\n", "a.toml", "model is not a field of a run but a section"),
    ("1: 2\n", "a.yaml", "1 is not a field of a run"),
    ("num_layers = 2.5\n", "a.toml", "num_layers=2.5 must be a whole number"),
    ("num_layers = inf\n", "a.toml", "num_layers=inf must be a whole number"),
    ("num_layers = true\n", "a.toml", "num_layers=True must be a whole number"),
    ('num_layers = "2 layers"\n', "a.toml", "num_layers='2 layers' must be a whole number"),
    ("lr = false\n", "a.toml", "lr=False must be a number"),
    ("lr: fast\n", "a.yaml", "lr='fast' must be a number"),
    ("lr:\n", "a.yaml", "lr=None must be a number"),
    ("lr:\n  peak: 1\n", "a.yaml", "lr is not a section of a run; they are model, "),
    ("lr: [1]\n", "a.yaml", "lr=[1] must be a number"),
    ("q_lora_rank: full\n", "a.yaml", "q_lora_rank='full' must be a whole number or nothing"),
    ("data_path: [a, null]\n", "a.yaml", "data_path=['a', None] must be a list of texts"),
    ("lr = 1\n[training]\nlr = 2\n", "a.toml", "lr is given twice, outside the sections and in section training; "
     "leave one out"),
    ("lr = 1\nseed = 3\nlr = 2\n", "a.toml", "lr is given twice, at line 1 and at line 3; leave one out"),
    ("[training]\nlr = 1\n[model]\n[training]\nlr = 2\n", "a.toml",
     "[training] is given twice, at line 1 and at line 4; leave one out"),
    ("[data]\nsplit = '1'\n[training]\nlr = 1\nlr = 2\n", "a.toml", "lr is given twice, at line 4 and at line 5"),
    ("lr: 1\ntraining:\n  lr: 2\n", "a.yaml", "lr is given twice, outside the sections and in section training"),
    ("lr: 1\nseed: 3\nlr: 2\n", "a.yaml", "lr is given twice, at line 1 and at line 3; leave one out"),
    ("training:\n  lr: 1\n  lr: 2\n", "a.yml", "lr is given twice, at line 2 and at line 3; leave one out"),
    ("training:\n  lr: 1\nmodel:\ntraining:\n", "a.yml", "training is given twice, at line 1 and at line 4"),
    ("phases:\n- name: a\n  lr: 1\n  lr: 2\n", "a.yml", "lr is given twice, at line 3 and at line 4"),
    ('{"lr": 1, "lr": 2}', "a.json", "lr is given twice in the same place, as 1 and as 2; leave one out"),
    ('{"training": {"lr": 1}, "lr": 2}', "a.json", "lr is given twice, in section training and outside the sections"),
    ('{"training": {"lr": 1}, "training": {}}', "a.json", "training is given twice in the same place, as {"),
    ("[model]\nlr = 1\n", "a.toml", "lr, in section model, is a field of section training; write it there, or outside "
     "the sections"),
    ("[training]\npreset = 'tiny'\n", "a.toml", "preset, in section training, is of the run; write it outside"),
    ("training: 3\n", "a.yaml", "training is not a field of a run but a section, which holds fields"),
    ("save = 3\n", "a.toml", "save=3 must be text or nothing"),
    ("eod_mask_loss = 1\n", "a.toml", "eod_mask_loss=1 must be true or false"),
    ("eod_mask_loss: 'true'\n", "a.yaml", "eod_mask_loss='true' must be true or false"),
    ("data_path = 3\n", "a.toml", "data_path=3 must be a list of texts"),
    ('{"rope_type": 1}', "a.json", "rope_type=1 must be text"),
    ("[1, 2]", "a.json", "must hold fields and their values, not a list"),
    ("", "a.json", "cannot be read as JSON: Expecting value: line 1 column 1 (char 0)"),
    ("a = \n", "a.toml", "cannot be read as TOML: Invalid value (at line 1, column 5)"),
    ("a: [1\nb: 2\n", "a.yaml", "cannot be read as YAML: while parsing a flow sequence in "),
    ("lr = 1\n", "a.ini", "its name must end with .toml, .yaml, .yml, .json"),
    ("lr = 1\n", "config", "its name must end with .toml, .yaml, .yml, .json"),
])
def test_a_wrong_file(text: str, name: str, message: str, file: Any) -> None:
    path = file(text, name)
    with pytest.raises(ConfigError) as error:
        read_config_file(path)
    assert str(error.value).startswith(f"config={path}: {message}")
    assert "\n" not in str(error.value)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read as TOML: 'utf-8' codec can't decode byte 0xff"):
        read_config_file(str(tmp_path / "a.toml"))


def test_a_section_without_fields_says_nothing(file: Any) -> None:
    assert parse_command(["--config", file("training:\n  # lr: 1\nlr: 2\n", "a.yaml")]).run.training.lr == 2.0


def test_a_merge_key_of_yaml_is_no_second_value(file: Any) -> None:
    text = "phases:\n- &first\n  name: a\n  train_iters: 2\n- <<: *first\n  name: b\n"
    phases = parse_command(["--config", file(text, "a.yaml")]).run.training.phases
    assert [(phase.name, phase.train_iters) for phase in phases] == [("a", 2), ("b", 2)]


def test_an_unknown_preset_in_a_file(file: Any) -> None:
    with pytest.raises(ConfigError, match=r"preset='tinny' is not known; choose one of tiny, laptop"):
        parse_command(["--config", file('preset = "tinny"\n')])


@pytest.mark.parametrize(("name", "text", "why"), [
    ("laughs.yaml", "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(12)),
     "it stands for more than 100000 values, with the alias [a-z] at line"),
    ("itself.yaml", "a: &a [*a, *a]\nb: *a\n", "it stands for more than 100000 values"),
    ("deep.yaml", "[" * 5000, "recursion"), ("deep.toml", "a = " + "[" * 20_000, "recursion"),
    ("deep.json", "[" * 100_000, "it is nested too deeply"),
    ("digits.json", '{"seed": ' + "7" * 5000 + "}", "4300 digits"),
    ("dots.toml", "a." * 400_000 + "a = 1", "it has a name of more than 100 parts"),
    ("dots2.toml", '["a" . ' * 2 + "a . " * 200 + "a]\nb = 1", "it has a name of more than 100 parts"),
    ("long.json", '{"seed": 1' + " " * 1_000_000 + "}", "it has more than 1,000,000 bytes, .*DSV3_MAX_CONFIG_MB")])
def test_settings_that_would_take_all_memory_or_time(tmp_path, name, text, why):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=why):
        read_config_file(str(tmp_path / name))


def test_a_few_aliases_are_read(tmp_path):
    (tmp_path / "a.yaml").write_text("training: &t\n  seed: 7\n")
    assert read_config_file(str(tmp_path / "a.yaml")) == {"seed": 7}
    (tmp_path / "a.toml").write_text('lr = 0.5\ndata_path = ["0.3", "a.b.c", "0.7", "d.e"]  # one. two.\n' * 1)
    assert read_config_file(str(tmp_path / "a.toml"))["lr"] == 0.5


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir",
                                 "!!python/name:os.mkdir", "!!python/module:os"])
def test_nothing_in_a_file_of_settings_is_run(tag: str, file: Any, tmp_path: Path) -> None:
    text = f"lr: {tag} [{tmp_path / 'made'}]\n"
    with pytest.raises(ConfigError, match="python/"):
        parse_command(["--config", file(text, "run.yaml")])
    assert not (tmp_path / "made").exists()
    if "apply" in tag:
        yaml.unsafe_load(text)
        assert (tmp_path / "made").exists(), "the payload works"
