"""Phases as they are written: files of three formats, the command line, and what is said about what cannot be."""

from __future__ import annotations

import ast
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dsv3_megatron.config import phases as phases_module
from dsv3_megatron.config import recipe as recipe_module
from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.load import parse_command
from dsv3_megatron.config.phases import Phase, read_phases
from dsv3_megatron.config.presets import PRESETS, preset
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.reports.summary import read_run_config

TOML = """
preset = "tiny"
lr = 1e-3
global_batch_size = 4

[[phases]]
name = "grow"
train_tokens = 2e6
lr_warmup_iters = 10
global_batch_size = 16
global_batch_size_increment = 4

[[phases]]
name = "decay"
train_iters = 100
lr = 1e-4
lr_decay_style = "cosine"
mtp_loss_scaling_factor = 0.1

[[phases]]
name = "long"
train_iters = 20
seq_length = 512
micro_batch_size = 1
global_batch_size = 8
moe_router_bias_update_rate = 0
rope_type = "yarn"
rotary_scaling_factor = 2
data_path = ["0.5", "books", "0.5", "code"]
"""
PHASES = (
    Phase("grow", train_tokens=2_000_000, lr_warmup_iters=10, global_batch_size=16, global_batch_size_increment=4),
    Phase("decay", train_iters=100, lr=1e-4, lr_decay_style="cosine", mtp_loss_scaling_factor=0.1),
    Phase("long", train_iters=20, seq_length=512, micro_batch_size=1, global_batch_size=8,
          moe_router_bias_update_rate=0.0, rope_type="yarn", rotary_scaling_factor=2.0,
          data_path=("0.5", "books", "0.5", "code")),
)


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def with_phases(*phases: dict[str, Any], **fields: Any) -> RunConfig:
    return preset("tiny").override(**fields, phases=list(phases))


# -- files and flags -----------------------------------------------------------------------------------


def test_three_formats_say_the_same(tmp_path: Path) -> None:
    run = parse_command(["--config", write(tmp_path / "run.toml", TOML)]).run
    assert run.training.phases == PHASES and run.training.lr == 1e-3 and run.training.global_batch_size == 4
    run.validate(2)
    tables = [phase.as_dict() for phase in PHASES]
    values = {"preset": "tiny", "lr": 1e-3, "global_batch_size": 4, "training": {"phases": tables}}
    for name, text in (("run.json", json.dumps(values)), ("run.yaml", yaml.safe_dump(values))):
        assert parse_command(["--config", write(tmp_path / name, text)]).run == run


def test_a_file_of_phases_alone_goes_with_a_flag(tmp_path: Path) -> None:
    file = write(tmp_path / "phases.yaml", yaml.safe_dump({"phases": [phase.as_dict() for phase in PHASES]}))
    assert parse_command(["--phases", file]).run.training.phases == PHASES
    assert parse_command(["--preset", "dsv3-671b", "--phases", "none"]).run.training.phases == ()
    with pytest.raises(ConfigError, match="must hold phases and nothing else; it has lr, preset, global_batch_size|"
                                          "it has global_batch_size, lr, preset: give a whole run with --config"):
        parse_command(["--phases", write(tmp_path / "run.toml", TOML)])
    with pytest.raises(ConfigError, match="argument --phases: absent.toml: no such file"):
        parse_command(["--phases", "absent.toml"])


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_the_resolved_configuration_reads_back_as_itself(name: str, tmp_path: Path) -> None:
    """By --config and by what reads a run's folder; presets as they are and with other phases."""
    runs = [preset(name), preset(name).override(phases=[
        {"name": "a", "train_iters": 3, "global_batch_size": 64, "lr": 1e-3}, {"name": "b", "train_tokens": 10**9}],
        stop_after_phase="a")]
    for number, run in enumerate(runs):
        file = write(tmp_path / f"{number}.json", json.dumps(run.as_dict()))
        again = parse_command(["--config", file]).run
        assert again == run and again.recipe() == run.recipe() and again.as_dict() == run.as_dict()
        assert read_run_config(Path(file)).recipe() == run.recipe()


def test_flags_take_the_place_of_what_a_file_says(tmp_path: Path) -> None:
    """A run without phases, resolved, goes on with phases; one with phases goes on as its preset without."""
    resolved = write(tmp_path / "config.json", json.dumps(preset("laptop").override(train_iters=7).as_dict()))
    file = write(tmp_path / "phases.yaml", yaml.safe_dump({"phases": [{"name": "a", "train_iters": 9}]}))
    assert parse_command(["--config", resolved, "--phases", file]).run.recipe().num_steps == 9
    assert parse_command(["--config", write(tmp_path / "run.toml", TOML), "--phases", "none"]).run == preset(
        "tiny").override(lr=1e-3, global_batch_size=4)


def test_the_first_phase_says_what_the_run_starts_with() -> None:
    run = with_phases({"name": "a", "train_iters": 3, "global_batch_size": 64, "seq_length": 128, "lr": 0.5})
    assert (run.training.global_batch_size, run.training.seq_length, run.training.lr) == (64, 128, 0.5)
    ramp = with_phases({"name": "a", "train_tokens": 10**6, "global_batch_size": 64, "global_batch_size_increment": 8,
                        "lr": 0.5, "lr_decay_style": "linear"}, global_batch_size=8, lr=0.25)
    assert (ramp.training.global_batch_size, ramp.training.lr) == (8, 0.25)


def test_numbers_may_be_written_as_people_do() -> None:
    (phase,) = read_phases([{"name": "a", "train_tokens": 469e9, "lr": "3e-4", "seq_length": "4096", "data_path": "x"}])
    assert (phase.train_tokens, phase.lr, phase.seq_length, phase.data_path) == (469 * 10**9, 3e-4, 4096, ("x",))
    assert isinstance(phase.train_tokens, int)


# -- what cannot be ------------------------------------------------------------------------------------

A = {"name": "a", "train_iters": 10}
BROKEN: list[tuple[list[dict[str, Any]], str]] = [
    ([{"name": "a"}], "phase 'a': a phase has one length: give it train_tokens or train_iters"),
    ([{**A, "train_tokens": 5}],
     "phase 'a': train_tokens=5, train_iters=10: a phase has one length: give it train_tokens or train_iters"),
    ([{"train_iters": 3}], "phase 1 of 1 has no name; give each phase one"),
    ([A, A], "2 phases are called 'a'; give each a name of its own"),
    ([{**A, "train_iters": 0}], "phase 'a': train_iters=0 must be at least 1"),
    ([{**A, "seq_length": 0}], "phase 'a': seq_length=0 must be at least 1"),
    ([{**A, "lr": -1.0}], "phase 'a': lr=-1.0 must not be negative"),
    ([{"name": "a", "train_tokens": 10**12, "global_batch_size": 2**31 - 1, "global_batch_size_increment": 1}],
     "phase 'a': global_batch_size_increment=1 makes 2147483639 batch sizes between 8 and 2147483647; at most 100000 "
     "are laid out: give a larger increment"),
    ([{**A, "train_iters": 2**31}], "phase 'a': train_iters=2147483648 must not exceed 2147483647"),
    ([{"name": "a", "train_tokens": 10**18 + 1}], "phase 'a': train_tokens=1000000000000000001 must not exceed "
     "1000000000000000000"),
    ([{**A, "lr": float("nan")}], "phase 'a': lr=nan must be a finite number"),
    ([{**A, "lr": 0.1, "lr_decay_style": "wsd"}],
     "phase 'a': lr_decay_style='wsd' must be one of constant, cosine, linear"),
    ([{**A, "lr_decay_style": "cosine"}],
     "phase 'a': lr_decay_style=cosine leads to the lr at the end of the phase, which is not given; give lr"),
    ([{**A, "lr": 0.1, "lr_decay_iters": 5}],
     "phase 'a': lr_decay_iters=5 has no effect with lr_decay_style=constant; leave it out, or set lr_decay_style to "
     "cosine or linear"),
    ([{**A, "lr_warmup_iters": 11}], "phase 'a': lr_warmup_iters=11 must not exceed train_iters=10"),
    ([{"name": "a", "train_tokens": 20_000, "lr_warmup_iters": 11}],
     "phase 'a': lr_warmup_iters=11 must not exceed the 10 steps that train_tokens=20000 make; make the warm-up "
     "shorter or the phase longer"),
    ([{**A, "global_batch_size_increment": 4}],
     "phase 'a': global_batch_size_increment=4 ramps the batch up to global_batch_size over the phase's train_tokens; "
     "give global_batch_size and train_tokens"),
    ([{"name": "a", "train_tokens": 10**6, "global_batch_size": 20, "global_batch_size_increment": 5}],
     "phase 'a': global_batch_size_increment=5 must divide the way from the 8 sequences before the phase to its "
     "global_batch_size=20, 12"),
    ([{"name": "a", "train_tokens": 10**6, "global_batch_size": 8, "global_batch_size_increment": 5}],
     "phase 'a': global_batch_size_increment=5 must divide the way from the 8 sequences before the phase to its "
     "global_batch_size=8, which is none; leave it out"),
    ([{"name": "a", "train_tokens": 2049}, {"name": "b", "train_tokens": 100}],
     "phase 'b': train_tokens=100 are fewer than the last step of the phase before has taken beyond its own end; leave "
     "the phase out, or make it longer"),
    ([A, {"name": "b", "train_iters": 1, "seq_length": 512, "rope_type": "yarn", "rotary_scaling_factor": 2.0,
          "original_max_position_embeddings": 4096}],
     "phase 'b': original_max_position_embeddings=4096 must not exceed max_position_embeddings=256 of the phase "
     "before, whose context YaRN extends; give the phase original_max_position_embeddings=256"),
    ([A, {"name": "b", "train_iters": 1, "seq_length": 513, "rope_type": "yarn", "rotary_scaling_factor": 2.0}],
     "phase 'b': seq_length=513 must not exceed max_position_embeddings=512"),
    ([A, {"name": "b", "train_iters": 1, "rope_type": "yarn", "rotary_scaling_factor": 0.5}],
     "phase 'b': rotary_scaling_factor=0.5 must be at least 1: YaRN extends the context by this factor"),
    ([A, {"name": "b", "train_iters": 1, "global_batch_size": 7}],
     "phase 'b': micro_batch_size=2 x data_parallel_size=1 (world_size=1 over 1 model-parallel ranks) must divide "
     "global_batch_size=7; try a global_batch_size that is a multiple of 2, or a micro_batch_size of 1 or 7"),
    ([{**A, "rope_type": "yarn"}],
     "phase 'a': rope_type=yarn: nothing comes before the first phase that it could change; give it to the run, "
     "outside its phases"),
    ([{**A, "train_iter": 3}], "phase 'a': train_iter is not a field of a phase; did you mean train_iters or "),
    ([{**A, "qqq": 3}], "phase 'a': qqq is not a field of a phase; it has name, train_tokens, train_iters, "),
    ([{"train_iters": "many"}], "phase '1': train_iters='many' must be a whole number"),
    ([{**A, "train_tokens": 1.5}], "phase 'a': train_tokens=1.5 must be a whole number"),
    ([{**A, "lr": True}], "phase 'a': lr=True must be a number"),
    ([{"name": 3}], "phase '3': name=3 must be text"),
    ([{**A, "data_path": 3}], "phase 'a': data_path=3 must be a list of texts"),
    ([3], "phases=[3] must be a list of tables, one a phase ([[phases]] in TOML)"),  # type: ignore[list-item]
]


@pytest.mark.parametrize(("phases", "message"), BROKEN, ids=[message[:60] for _, message in BROKEN])
def test_a_broken_phase_is_named_with_values_and_way_out(phases: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        with_phases(*phases).validate(1)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize(("fields", "message"), [
    ({"train_iters": 300}, "train_iters=300 cannot go with phases, which say how long the run is and how its learning "
                           "rate changes; leave it out, or give --phases none (phases = [] in a file) for a run"),
    ({"min_lr": 0.0}, "min_lr=0.0 cannot go with phases"),
    ({"seq_length": 64}, "seq_length=64 has no effect: phase 'a', the first, has seq_length=128 from its first step "
                         "on; change it there, or leave it out here"),
    ({"stop_after_phase": "b"}, "stop_after_phase='b' is no phase of the run; its phases are a"),
])
def test_what_phases_leave_no_use_for(fields: dict[str, Any], message: str) -> None:
    phases = [{**A, "seq_length": 128}]
    for change in (lambda: with_phases(*phases, **fields), lambda: with_phases(*phases).override(**fields)):
        with pytest.raises(ConfigError) as error:
            change().validate(1)
        assert str(error.value).startswith(message)


def test_train_iters_with_a_file_of_phases(tmp_path: Path) -> None:
    config = write(tmp_path / "run.toml", TOML)
    with pytest.raises(ConfigError, match="train_iters=5 cannot go with phases"):
        parse_command(["--config", config, "--train-iters", "5"])
    assert parse_command(["--config", config, "--phases", "none", "--train-iters", "5"]).run.training.train_iters == 5


def test_no_rule_goes_untested() -> None:
    """Every `raise ConfigError` about phases is reached above."""
    reached = set()
    runs = [lambda phases=phases: with_phases(*phases) for phases, _ in BROKEN]
    runs += [lambda fields=fields: with_phases({**A, "seq_length": 128}, **fields)
             for fields in ({"train_iters": 1}, {"seq_length": 64}, {"stop_after_phase": "b"})]
    checks = [lambda make=make: make().validate(1) for make in runs]
    checks.append(lambda: with_phases(A).recipe().placed_at(recipe_module.TrainedAmount(10**9, 10**15, 10**12)))
    for check in checks:
        with pytest.raises(ConfigError) as error:
            check()
        cause: BaseException | None = error.value
        while cause is not None:
            traceback = cause.__traceback__
            while traceback is not None:
                reached.add((traceback.tb_frame.f_code.co_filename, traceback.tb_lineno))
                traceback = traceback.tb_next
            cause = cause.__cause__
    for module in (phases_module, recipe_module):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Raise):
                lines = {(module.__file__, line) for line in range(node.lineno, (node.end_lineno or 0) + 1)}
                assert lines & reached, f"no test reaches {module.__file__}:{node.lineno}"


def test_the_guides_example(tmp_path: Path) -> None:
    text = (Path(__file__).resolve().parents[3] / "docs/guides/run.md").read_text(encoding="utf-8")
    (example,) = [block.partition("```")[0] for block in text.split("```toml\n")[1:]]
    run = parse_command(["--config", write(tmp_path / "run.toml", example)]).run
    run.validate(2)
    assert [phase.training.seq_length for phase in run.recipe().phases] == [256, 256, 512]
    assert run.recipe().phases[2].model.max_position_embeddings == 512
