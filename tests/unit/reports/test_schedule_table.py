"""The printed and drawn recipe: DeepSeek-V3's, quickly, without torch and without a step."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

from dsv3_megatron.commands import train
from dsv3_megatron.config.presets import PRESETS, preset
from dsv3_megatron.reports.schedule_plot import plot_schedule
from dsv3_megatron.reports.schedule_table import boundaries, schedule_table


def test_the_whole_of_deepseek_v3_in_under_two_seconds_without_torch() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "dsv3_megatron", "train", "--preset", "dsv3-671b",
         "--print-schedule"],
        capture_output=True, text=True, timeout=60, check=True, env=dict(os.environ))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2.0
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert not {"torch", "numpy", "megatron", "matplotlib"} & imported
    lines = done.stdout.splitlines()
    assert lines[0] == "dsv3-671b: 246,108 steps, 14,925,875,380,224 tokens, 3,615,692,544 sequences"
    rows = [line.split() for line in lines]
    expected = [
        "ramp start 0 0 1.1e-07 3,072 0.3 0.001 4,096 RoPE",
        "warm-up ends 2,000 25,165,824,000 0.00022 3,072 0.3 0.001 4,096 RoPE",
        "constant start 16,323 469,053,210,624 0.00022 15,360 0.3 0.001 4,096 RoPE",
        "decay start 167,814 10,000,042,819,584 0.00022 15,360 0.1 0.001 4,096 RoPE",
        "low start 236,160 14,300,001,337,344 2.2e-05 15,360 0.1 0 4,096 RoPE",
        "lowest start 241,453 14,633,008,103,424 7.3e-06 15,360 0.1 0 4,096 RoPE",
        "extension-32k start 244,108 14,800,046,260,224 7.3e-06 1,920 0.1 0 32,768 YaRN x 40",
        "extension-128k start 245,108 14,862,960,820,224 7.3e-06 480 0.1 0 131,072 YaRN x 40",
        "end 246,108 14,925,875,380,224 7.3e-06 480 0.1 0 131,072 YaRN x 40"]
    assert [row for row in rows if " ".join(row) in expected] == [line.split() for line in expected]
    assert sum(row[0] == "batch" for row in rows) == 11
    assert lines[-1].startswith("this run stops after phase lowest, at step 244,108:")


def test_json_has_the_tables_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--preset", "dsv3-671b", "--print-schedule", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["num_steps"], values["num_steps_before_stop"]) == (246_108, 244_108)
    assert [phase["name"] for phase in values["phases"]] == [
        "ramp", "constant", "decay", "low", "lowest", "extension-32k", "extension-128k"]
    assert values["phases"][0]["batch_sizes"] == list(range(3072, 15360, 1024))
    assert [row["iteration"] for row in values["boundaries"]] == [
        row.iteration for row in boundaries(preset("dsv3-671b").recipe())]


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_has_a_table(name: str) -> None:
    lines = schedule_table(preset(name)).splitlines()
    recipe = preset(name).recipe()
    assert lines[0].startswith(f"{name}: {recipe.phases[-1].end.iteration:,} steps")
    assert len({len(line.split()) for line in lines if line.split()[0] == "batch"}) <= 1
    assert any(line.split()[0] == "end" for line in lines)


def test_a_fine_ramp_is_shown_by_some_of_its_batches_and_a_short_decay_by_its_end() -> None:
    run = preset("tiny").override(phases=[
        {"name": "a", "train_tokens": 10**7, "global_batch_size": 208, "global_batch_size_increment": 2},
        {"name": "b", "train_iters": 40, "lr": 0.0, "lr_decay_style": "linear", "lr_decay_iters": 30}])
    rows = boundaries(run.recipe())
    shown = [row.global_batch_size for row in rows if row.event == "batch"]
    assert 10 < len(shown) <= 16 and shown == sorted(set(shown)) and shown[0] > 8
    (decayed,) = [row for row in rows if row.event == "linear decay ends"]
    assert decayed.iteration == run.recipe().phases[1].start.iteration + 30 and decayed.learning_rate == 0.0


def test_the_plot_is_drawn_by_the_command(tmp_path: Path) -> None:
    file = tmp_path / "schedule.png"
    assert train.main(["--preset", "dsv3-671b", "--plot-schedule", str(file)]) == 0
    image = imread(file)
    assert image.shape[0] > 900 and image.shape[1] > 1200 and image[..., :3].std() > 0.05
    plot_schedule(preset("tiny").recipe(), str(tmp_path / "tiny.png"), title="tiny")
    assert (tmp_path / "tiny.png").stat().st_size > 10_000


def test_a_plot_without_a_folder_is_an_error_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--plot-schedule", str(tmp_path / "absent" / "a.png")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --plot-schedule={tmp_path}/absent/a.png: the folder ") and error.count("\n") == 1
