"""From flags and files to a run: what is read, in which order, and what is said about what cannot be."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.load import build_parser, parse_command, read_config_file
from dsv3_megatron.config.presets import PRESETS, preset
from dsv3_megatron.config.run import SECTIONS, RunConfig, section_of

FIELDS = [field for cls in SECTIONS.values() for field in dataclasses.fields(cls)]
ACTIONS = {action.dest: action for action in build_parser()._actions}


def value_of(run: RunConfig, name: str) -> Any:
    """A field's value, whatever its section."""
    return getattr(getattr(run, section_of(name)), name)


@pytest.fixture
def file(tmp_path: Path) -> Any:
    def write(text: str, name: str = "run.toml") -> str:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


# -- the command line ----------------------------------------------------------------------------------


def test_without_arguments_it_is_tiny() -> None:
    command = parse_command([])
    assert command.run == preset("tiny")
    assert (command.print_model, command.as_json, command.check_only, command.world_size) == (False, False, False, None)
    assert (command.print_schedule, command.plot_schedule) == (False, None)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_by_name(name: str) -> None:
    assert parse_command(["--preset", name]).run == preset(name)


def test_what_to_do_instead_of_training() -> None:
    command = parse_command(["--print-model", "--json", "--check-only", "--world-size", "4"])
    assert (command.print_model, command.as_json, command.check_only, command.world_size) == (True, True, True, 4)
    command = parse_command(["--print-schedule", "--json", "--world-size", "4", "--plot-schedule", "a.png"])
    assert (command.print_schedule, command.plot_schedule, command.as_json) == (True, "a.png", True)


def _sample(field: dataclasses.Field) -> tuple[list[str], Any]:
    """Words for a field's flag, and the value they stand for: not any preset's."""
    if field.type == "bool":
        return [], True
    if field.metadata["nargs"]:
        return ["0.3", "a b", "0.7", "c"], ("0.3", "a b", "0.7", "c")
    if field.metadata["choices"]:
        return [field.metadata["choices"][-1]], field.metadata["choices"][-1]
    kind = str(field.type).removesuffix(" | None")
    word, value = {"int": ("7", 7), "float": ("3e-1", 0.3), "str": ("some where", "some where")}[kind]
    return [word], value


@pytest.mark.parametrize("field", [field for field in FIELDS if field.name != "phases"], ids=lambda field: field.name)
def test_every_flag_lands_in_its_field_and_nowhere_else(field: dataclasses.Field) -> None:
    flag, *opposite = ACTIONS[field.name].option_strings
    assert opposite == ([flag.replace("--", "--no-", 1)] if field.type == "bool" else [])
    words, value = _sample(field)
    # Flags of YaRN alone are refused for a run without it (test_megatron_flags.py).
    yarn = {"rope_type": "yarn"} if field.name in ("rotary_scaling_factor", "beta_fast", "beta_slow") else {}
    run = parse_command([flag, *words, *(["--rope-type", "yarn"] if yarn else [])]).run
    assert value_of(run, field.name) == value and type(value_of(run, field.name)) is type(value)
    assert run == preset("tiny").override(**yarn, **{field.name: value})


@pytest.mark.parametrize("field", [field for field in FIELDS if field.type == "bool"], ids=lambda f: f.name)
def test_a_switch_is_off_until_given_and_can_be_taken_back(field: dataclasses.Field, file: Any) -> None:
    assert not any(value_of(make(), field.name) for make in PRESETS.values())
    flag, opposite = ACTIONS[field.name].option_strings
    config = file(f"{field.name} = true\n")
    assert value_of(parse_command(["--config", config]).run, field.name) is True
    assert value_of(parse_command(["--config", config, opposite]).run, field.name) is False
    assert value_of(parse_command(["--config", file(f"{field.name}: false\n", "a.yaml"), flag]).run, field.name) is True
    with pytest.raises(ConfigError, match=f"{flag}=yes is not a flag|ignored explicit argument 'yes'"):
        parse_command([f"{flag}=yes"])
    with pytest.raises(ConfigError, match=f"^{opposite} is given twice: {flag} and {opposite}; leave one out$"):
        parse_command([flag, opposite])


@pytest.mark.parametrize("field", [field for field in FIELDS if "None" in str(field.type)], ids=lambda f: f.name)
def test_an_optional_flag_takes_none(field: dataclasses.Field) -> None:
    # Without phases, which leave some of them no use.
    run = parse_command(["--preset", "dsv3-671b", "--phases", "none", *ACTIONS[field.name].option_strings, "none"]).run
    assert value_of(run, field.name) is None


def test_help_has_every_flag_with_the_presets_default() -> None:
    """A default is shown exactly where all presets have it, and it is theirs."""
    assert set(ACTIONS) == {field.name for field in FIELDS} | {
        "help", "preset", "config", "print_model", "print_schedule", "plot_schedule", "as_json", "check_only",
        "world_size"}
    shown_somewhere = 0
    for field in FIELDS:
        values = [value_of(make(), field.name) for make in PRESETS.values()]
        shown = re.search(r" \(default: (.*)\)$", str(ACTIONS[field.name].help))
        if shown:
            shown_somewhere += 1
            assert [str(value) for value in values] == [shown.group(1)] * len(values), field.name
        else:
            assert any(value != values[0] for value in values) or values[0] in (None, [], ()), field.name
    assert shown_somewhere > 20


def test_help_is_grouped_by_section() -> None:
    groups = {action.dest: group.title for group in build_parser()._action_groups for action in group._group_actions}
    assert len(set(groups.values())) == 2 + len(SECTIONS)
    for section, cls in SECTIONS.items():
        assert len({groups[field.name] for field in dataclasses.fields(cls)}) == 1, section
    assert all(action.help for action in ACTIONS.values())


def test_flags_of_megatron_lm_keep_its_spelling() -> None:
    flags = {flag for action in ACTIONS.values() for flag in action.option_strings}
    assert {"--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--pipeline-model-parallel-layout",
            "--expert-model-parallel-size", "--expert-tensor-parallel-size", "--context-parallel-size",
            "--num-virtual-stages-per-pipeline-rank", "--num-layers", "--hidden-size", "--ffn-hidden-size",
            "--num-attention-heads", "--seq-length", "--max-position-embeddings", "--micro-batch-size",
            "--global-batch-size", "--train-iters", "--lr", "--min-lr", "--lr-warmup-iters", "--lr-decay-style",
            "--lr-decay-iters", "--adam-beta1", "--adam-beta2", "--adam-eps", "--weight-decay", "--clip-grad",
            "--num-experts", "--moe-ffn-hidden-size", "--moe-router-topk", "--moe-router-num-groups",
            "--moe-router-group-topk", "--moe-router-topk-scaling-factor", "--moe-router-bias-update-rate",
            "--moe-aux-loss-coeff", "--mtp-num-layers", "--mtp-loss-scaling-factor", "--q-lora-rank", "--kv-lora-rank",
            "--v-head-dim", "--norm-epsilon", "--rotary-base", "--init-method-std", "--transformer-impl", "--seed",
            "--data-path", "--valid-data-path", "--split", "--data-cache-path", "--tokenizer-model", "--save", "--load",
            "--save-interval", "--tensorboard-dir", "--log-interval", "--eval-interval", "--eval-iters",
            "--reset-attention-mask", "--reset-position-ids", "--eod-mask-loss"} <= flags


@pytest.mark.parametrize(("arguments", "message"), [
    (["--num-layer", "3"], "--num-layer is not a flag; did you mean --num-layers or "),
    (["--tensor-parallel-size=2"], "--tensor-parallel-size is not a flag; did you mean --tensor-model-parallel-size"),
    (["--zzz"], "--zzz is not a flag; see --help"),
    (["text"], "text is not a flag; see --help"),
    (["--lr"], "argument --lr: expected one argument; see --help"),
    (["--lr", "abc"], "argument --lr: invalid float value: 'abc'; see --help"),
    (["--num-layers", "2.5"], "argument --num-layers: invalid int value: '2.5'; see --help"),
    (["--q-lora-rank", "many"], "argument --q-lora-rank: invalid int value: 'many'; see --help"),
    (["--preset", "tinny"], "argument --preset: invalid choice: 'tinny' (choose from "),
    (["--rope-type", "alibi"], "argument --rope-type: invalid choice: 'alibi' (choose from "),
    (["--json"], "--json says how --print-model and --print-schedule print; give one of them too"),
    (["--world-size", "4"], "--world-size=4 is for --print-model, --print-schedule and --check-only; a run has as many "
                            "processes as"),
    (["--plot-schedule", "schedule.svg"], "--plot-schedule=schedule.svg must end with .png: that is what is drawn"),
    (["--world-size", "0", "--check-only"], "--world-size=0 must be at least 1"),
    (["--config", "absent.toml"], "config=absent.toml: no such file"),
    (["--lr", "1e-3", "--seed", "2", "--lr=2e-3"], "--lr is given twice: --lr 1e-3 and --lr=2e-3; leave one out"),
    (["--data-path", "a", "b", "--data-path", "c"], "--data-path is given twice: --data-path a b and --data-path c"),
    (["--preset", "tiny", "--preset", "tiny"], "--preset is given twice: "),
    (["--check-only", "--check-only"], "--check-only is given twice: "),
    (["--train-iters", "1e-3"], "argument --train-iters: invalid int value: '1e-3'"),
    (["--train-iters", "1e999999999"], "argument --train-iters: invalid int value: '1e999999999'"),
    (["--train-iters", "inf"], "argument --train-iters: invalid int value: 'inf'"),
])
def test_a_wrong_command_line(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_command(arguments)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_abbreviations_are_not_guessed() -> None:
    with pytest.raises(ConfigError, match="--train-iter is not a flag; did you mean --train-iters"):
        parse_command(["--train-iter", "3"])


def test_the_parser_reports_like_every_other_rule() -> None:
    assert isinstance(build_parser(), argparse.ArgumentParser)
    with pytest.raises(ConfigError):
        build_parser().error("something")


# -- files ---------------------------------------------------------------------------------------------

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


def test_command_line_overrides_file_overrides_preset(file: Any) -> None:
    config = file('preset = "laptop"\ntrain_iters = 7\nseed = 8\n')
    run = parse_command(["--config", config, "--seed", "9"]).run
    assert run == preset("laptop").override(train_iters=7, seed=9)
    assert parse_command(["--config", config, "--preset", "tiny"]).run == preset("tiny").override(train_iters=7, seed=8)


def test_numbers_as_yaml_writes_them(file: Any) -> None:
    """YAML 1.1 reads 3e-4, without a point, as text."""
    assert yaml.safe_load("3e-4") == "3e-4"
    assert parse_command(["--config", file("lr: 3e-3\n", "run.yaml")]).run.training.lr == 3e-3


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_resolved_run_reads_back_as_itself(name: str, file: Any) -> None:
    without_phases = {} if preset(name).training.phases else {"lr_decay_iters": 5}
    run = preset(name).override(data_path=["0.3", "a", "0.7", "b c"], q_lora_rank=None, save="x", lr=1 / 3,
                                layernorm_epsilon=1e-12, reset_attention_mask=True, **without_phases)
    path = file(json.dumps(run.as_dict()), "config.json")
    assert parse_command(["--config", path]).run == run


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


def test_a_section_without_fields_says_nothing(file: Any) -> None:
    assert parse_command(["--config", file("training:\n  # lr: 1\nlr: 2\n", "a.yaml")]).run.training.lr == 2.0


def test_a_merge_key_of_yaml_is_no_second_value(file: Any) -> None:
    text = "phases:\n- &first\n  name: a\n  train_iters: 2\n- <<: *first\n  name: b\n"
    phases = parse_command(["--config", file(text, "a.yaml")]).run.training.phases
    assert [(phase.name, phase.train_iters) for phase in phases] == [("a", 2), ("b", 2)]


def test_an_unknown_preset_in_a_file(file: Any) -> None:
    with pytest.raises(ConfigError, match=r"preset='tinny' is not known; choose one of tiny, laptop"):
        parse_command(["--config", file('preset = "tinny"\n')])


def test_a_field_that_no_section_has() -> None:
    with pytest.raises(ConfigError, match=r"^learning_rate is not a field of a run"):
        preset("tiny").override(learning_rate=1.0)
