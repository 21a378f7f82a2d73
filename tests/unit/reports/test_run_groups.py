"""Runs by their setting: of a sweep, by what they were asked to be, and what is said of folders that are neither."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.presets import preset
from dsv3_megatron.reports.run_groups import band_of, read_groups


def write_logs(logs: Path, *, config: bool = True, num_steps: int = 2, **changes: object) -> Path:
    logs.mkdir(parents=True)
    (logs / "metrics.jsonl").write_text("".join(
        json.dumps({"kind": "step", "iteration": step, "lm_loss": 1.0 / step}) + "\n"
        for step in range(1, num_steps + 1)))
    if config:
        run = preset("tiny").override(save=str(logs / "elsewhere"), tensorboard_dir=str(logs), **changes)
        (logs / "config.json").write_text(json.dumps(run.as_dict()))
    return logs


def write_sweep(folder: Path, runs: dict[str, list[int]]) -> Path:
    content = [{"setting": setting, "seed": seed, "folder": f"{setting}/seed-{seed}"}
               for setting, seeds in runs.items() for seed in seeds]
    folder.mkdir()
    (folder / "sweep.json").write_text(json.dumps({"runs": content}))
    return folder


def names(*folders: Path) -> dict[str, list[int | None]]:
    groups, _ = read_groups(folders)
    return {group.name: [run.seed for run in group.runs] for group in groups}


def test_runs_that_differ_by_seed_and_folders_alone_are_one_setting(tmp_path: Path) -> None:
    folders = [write_logs(tmp_path / f"{lr}-{seed}" / "tensorboard", lr=lr, seed=seed)
               for lr in (1e-3, 6e-3) for seed in (1, 2)]
    assert names(*folders) == {"lr=0.001": [1, 2], "lr=0.006": [1, 2]}
    assert names(*(folder.parent for folder in folders)) == names(*folders), "the folder above will do"
    assert names(*folders[:2]) == {"0.001-1": [1, 2]}, "with nothing to tell it from, it has its folder's name"


def test_runs_that_differ_in_much_have_their_folders_names(tmp_path: Path) -> None:
    one = write_logs(tmp_path / "one")
    other = write_logs(tmp_path / "other", lr=1.0, train_iters=7, eval_iters=3, vocab_size=512)
    unknown = write_logs(tmp_path / "unknown", config=False)
    assert names(one, other, unknown) == {"one": [1234], "other": [1234], "unknown": [None]}


def test_a_sweeps_runs_are_grouped_by_its_settings(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "study", {"a": [1, 2], "b": [1, 2]})
    for setting, seed in (("a", 1), ("a", 2), ("b", 2)):
        write_logs(sweep / setting / f"seed-{seed}" / "tensorboard", config=False)
    groups, remarks = read_groups([sweep])
    assert [(group.name, [run.seed for run in group.runs]) for group in groups] == [("a", [1, 2]), ("b", [2])]
    assert remarks == [f"{sweep}/b/seed-1/tensorboard has no step yet: drawn without it"]
    alone = write_logs(tmp_path / "a")
    assert names(sweep, alone) == {"a": [1, 2], "b": [2], "a'": [1234]}
    other = write_sweep(tmp_path / "later", {"a": [3]})
    write_logs(other / "a" / "seed-3" / "tensorboard")
    assert names(sweep, other) == {"study: a": [1, 2], "study: b": [2], "later: a": [3]}


def test_a_band_is_where_all_runs_have_a_value() -> None:
    assert band_of([[(1, 1.0), (2, 2.0), (3, 9.0)], [(2, 4.0), (1, 3.0)]]) == [(1, 2.0, 1.0, 3.0), (2, 3.0, 2.0, 4.0)]
    assert band_of([]) == []


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has neither metrics.jsonl nor sweep.json: give the folder"):
        read_groups([tmp_path])
    logs = write_logs(tmp_path / "run")
    with pytest.raises(ConfigError, match="run is named twice; a run counts once"):
        read_groups([logs, tmp_path / "run"])
    (logs / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="config.json is not JSON of a run"):
        read_groups([logs])
    sweep = write_sweep(tmp_path / "study", {"a": [1]})
    (sweep / "sweep.json").write_text('{"runs": 3}')
    with pytest.raises(ConfigError, match="sweep.json is not a sweep's .* writes it anew"):
        read_groups([sweep])
