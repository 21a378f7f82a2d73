"""The file of a sweep: what runs it makes, and what is wrong with one that cannot be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.load import CommandLine, parse_command
from dsv3_megatron.config.sweep_file import SweepPlan, check_settings, read_sweep

HEAD = 'output = "runs/study"\nseeds = [1, 2, 3]\n'
Read = Callable[[str], SweepPlan]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    def of(text: str) -> SweepPlan:
        file = tmp_path / "study.toml"
        file.write_text(text)
        return read_sweep(str(file), lambda command: CommandLine(prog=f"dsv3 {command}"))

    return of


def test_a_grid_is_every_combination_and_each_seed_of_it_is_a_run(read: Read) -> None:
    plan = read(HEAD + '[settings]\npreset = "tiny"\ndata_path = ["a", "b"]\neod-mask-loss = true\n'
                       'async_save = false\nlr_warmup_iters = 5\n[grid]\nlr = [1e-3, 6e-3]\ntrain-iters = [10, 20]\n')
    assert [setting.name for setting in plan.settings] == [
        "lr=0.001, train_iters=10", "lr=0.001, train_iters=20", "lr=0.006, train_iters=10", "lr=0.006, train_iters=20"]
    assert plan.settings[1].values == {"lr": 0.001, "train_iters": 20}
    assert plan.settings[1].words == ("--preset", "tiny", "--data-path", "a", "b", "--eod-mask-loss", "--no-async-save",
                                      "--lr-warmup-iters", "5", "--lr", "0.001", "--train-iters", "20")
    assert len(plan.runs) == 12 and len({run.folder for run in plan.runs}) == 12
    assert [run.seed for run in plan.runs] == [1] * 4 + [2] * 4 + [3] * 4
    first = plan.runs[0]
    assert first.words == (*plan.settings[0].words, "--seed", "1", "--save", f"{first.folder}/checkpoints",
                           "--tensorboard-dir", f"{first.folder}/tensorboard", "--resume", "auto")
    run = parse_command(first.words).run
    assert (run.training.lr, run.training.seed, run.data.data_path) == (0.001, 1, ("a", "b"))
    assert run.data.eod_mask_loss and not run.checkpoint.async_save
    assert check_settings(plan, parse_command) == dict(zip(
        [setting.name for setting in plan.settings], (10, 20, 10, 20), strict=True))


def test_variants_have_names_and_the_grid_is_done_with_each(read: Read) -> None:
    plan = read(HEAD + 'base = "nothing, lr=0.001"\n[settings]\nmoe_aux_loss_coeff = 1\n[variants.nothing]\n'
                       '[variants."a/b: loss"]\nmoe_aux_loss_coeff = 1e-2\n[grid]\nlr = [1e-3, 6e-3]\n')
    assert [setting.name for setting in plan.settings] == [
        "nothing, lr=0.001", "nothing, lr=0.006", "a/b: loss, lr=0.001", "a/b: loss, lr=0.006"]
    assert plan.settings[2].folder == "a_b_loss_lr=0.001"
    assert plan.settings[2].words == ("--moe-aux-loss-coeff", "0.01", "--lr", "0.001"), "a variant's comes before all's"


def test_one_setting_alone_and_a_field_whose_flag_has_another_name(read: Read) -> None:
    plan = read(HEAD + "[settings]\nlayernorm_epsilon = 1e-5\nlr=-1\n")
    assert [setting.name for setting in plan.settings] == ["base"]
    assert plan.settings[0].words == ("--norm-epsilon", "1e-05", "--lr=-1")
    with pytest.raises(ConfigError, match=r"setting 'base': lr=-1.0 must not be negative"):
        check_settings(plan, parse_command)


def test_a_file_of_a_run_is_in_its_folder(read: Read) -> None:
    plan = read(HEAD + '[settings]\nexport_hf = "{run}/exported"\n')
    assert plan.runs[1].words[1] == "runs/study/base/seed-2/exported"
    assert plan.runs[0].own_words == ("--export-hf", "{run}/exported", "--seed", "1"), "which do not name the folder"


@pytest.mark.parametrize(("text", "message"), [
    ("seeds = [1]\n", "output=None must name the folder of the sweep"),
    ('output = "x"\n', r"seeds=None must be a list of whole numbers, as in seeds = \[1, 2, 3\]"),
    ('output = "x"\nseeds = [1, 2, 1]\n', "seeds has 1 twice: both would be the same run, in one folder"),
    ('output = "x"\nseeds = [1.5]\n', "seeds has 1.5: a seed is a whole number from 0 to 4294967295"),
    (HEAD + 'command = "plan"\n', "command='plan' must be one of train, sft, grpo"),
    (HEAD + "lr = 1e-3\n", r"lr is not a part of a sweep; the settings of its runs belong into \[settings\]"),
    (HEAD + "at_a_time = 0\n", "at_a_time=0 must be a whole number from 1 to 4096"),
    (HEAD + 'base = "none"\n', "base='none' is not a setting of this sweep; they are 'base'"),
    (HEAD + "[settings]\nlrr = 1\n[grid]\ntrain_itres = [1]\n[variants.a]\nnothing_like_it_at_all = 2\n",
     r"no flag of the command: lrr, in \[settings\] \(did you mean lr.*train_itres, in \[grid\] \(did you mean "
     r"train-iters.*nothing_like_it_at_all, in \[variants.a\]"),
    (HEAD + "[settings]\nseed = 1\n",
     r"seed, in \[settings\], is given by the sweep to each of its runs; leave it out, and name seeds"),
    (HEAD + '[settings]\nsave = "x"\n', "save, in .* is given by the sweep"),
    (HEAD + "[settings]\ncheck_only = true\n", "check_only, in .* makes a command print or check something and stop"),
    (HEAD + "[settings]\ntrain-iters = 1\ntrain_iters = 2\n", "train_iters, in .* is given twice, with - and with _"),
    (HEAD + "[settings]\nlr = 1\n[grid]\nlr = [1]\n", r"lr is given twice, in \[grid\] and in \[settings\]"),
    (HEAD + "[grid]\nlr = 1\n", "grid.lr=1 must be a list of the values to try"),
    (HEAD + "[grid]\nlr = []\n", r"grid.lr=\[\] must be a list of the values to try"),
    (HEAD + "[settings.training]\nlr = 1\n", "no flag of the command: training, in"),
    (HEAD + "[settings]\nphases = [{}]\n", "phases={} must be a text, a number"),
    (HEAD + "[grid]\nlr = [1e-3, 0.001]\n", "'lr=0.001' and 'lr=0.001' would share the folder"),
    (HEAD + "[grid]\nlr = [0.10000001, 0.1]\n", "would share the folder lr=0.1; name them apart"),
    (HEAD + "[variants.a]\nlr = 1\n[variants.b]\nlr = 1\n", "the settings 'a' and 'b' are the same run; leave one out"),
    (HEAD + '[variants."a b"]\nlr = 1\n[variants."a/b"]\nlr = 2\n', "'a b' and 'a/b' would share the folder a_b"),
    (HEAD + f'[variants.{"a" * 160}]\n', "has a name of 160 characters, and its folder at most 150"),
    (HEAD + '[settings]\nexport_hf = "out/model"\n', r"export_hf=out/model would be written by the runs 'base, seed 1' "
     r"and 'base, seed 2'; have each write its own, as in export_hf = \"{run}/model\""),
    (HEAD + "[grid\n", "study.toml: cannot be read as TOML"),
])
def test_what_is_wrong_with_a_file_is_said_before_anything_starts(read: Read, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        read(text)
    assert "study.toml: " in str(error.value) and "config=" not in str(error.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none.toml: no such file"):
        read_sweep(str(tmp_path / "none.toml"), lambda command: CommandLine())


def test_each_setting_is_checked_as_the_run_that_it_is(read: Read) -> None:
    plan = read(HEAD + "processes = 3\n[grid]\nglobal_batch_size = [6, 8]\n")
    with pytest.raises(ConfigError, match="setting 'global_batch_size=8': micro_batch_size=2 x data_parallel_size=3"):
        check_settings(plan, parse_command)
