"""From flags and files to a run: what is read, in which order, and what is said about what cannot be."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from typing import Any

import pytest

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.load import build_parser, parse_command
from dsv3_megatron.config.presets import PRESETS, preset
from dsv3_megatron.config.run import SECTIONS, RunConfig, section_of

FIELDS = [field for cls in SECTIONS.values() for field in dataclasses.fields(cls)]
ACTIONS = {action.dest: action for action in build_parser()._actions}


def value_of(run: RunConfig, name: str) -> Any:
    """A field's value, whatever its section."""
    return getattr(getattr(run, section_of(name)), name)


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
        last = [*field.metadata["choices"]][-1]
        return [last], last
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
    # What changes no bit of a run and costs no more than host memory is on.
    is_on = field.name in ("overlap_grad_reduce", "overlap_param_gather", "async_save")
    assert {value_of(make(), field.name) for make in PRESETS.values()} == {is_on}
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
        "help", "preset", "from_hf", "config", "print_model", "print_schedule", "plot_schedule", "as_json",
        "check_only", "world_size", "hardware", "allow_memory_overflow"}
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
            "--cp-comm-type", "--num-virtual-stages-per-pipeline-rank",
            "--num-layers", "--hidden-size", "--ffn-hidden-size",
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


def test_command_line_overrides_file_overrides_preset(file: Any) -> None:
    config = file('preset = "laptop"\ntrain_iters = 7\nseed = 8\n')
    run = parse_command(["--config", config, "--seed", "9"]).run
    assert run == preset("laptop").override(train_iters=7, seed=9)
    assert parse_command(["--config", config, "--preset", "tiny"]).run == preset("tiny").override(train_iters=7, seed=8)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_resolved_run_reads_back_as_itself(name: str, file: Any) -> None:
    without_phases = {} if preset(name).training.phases else {"lr_decay_iters": 5}
    run = preset(name).override(data_path=["0.3", "a", "0.7", "b c"], q_lora_rank=None, save="x", lr=1 / 3,
                                layernorm_epsilon=1e-12, reset_attention_mask=True, **without_phases)
    path = file(json.dumps(run.as_dict()), "config.json")
    assert parse_command(["--config", path]).run == run


def test_a_field_that_no_section_has() -> None:
    with pytest.raises(ConfigError, match=r"^learning_rate is not a field of a run"):
        preset("tiny").override(learning_rate=1.0)
