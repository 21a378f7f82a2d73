"""The table of a sweep: last and best of each run, and mean and spread over the seeds, against numbers made by hand."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from dsv3_megatron.reports.sweep_table import (
    DONE,
    RunResult,
    Spread,
    as_csv,
    as_json,
    as_text,
    differences,
    measures_of,
)


def write_run(folder: Path, losses: list[float], validations: dict[int, float], **extra: float) -> Path:
    logs = folder / "tensorboard"
    logs.mkdir(parents=True)
    lines = [{"kind": "step", "iteration": step, "lm_loss": loss, **extra} for step, loss in enumerate(losses, 1)]
    lines += [{"kind": "validation", "iteration": step, "lm_loss": loss, **extra} for step, loss in validations.items()]
    (logs / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def result(folder: Path, setting: str, seed: int, state: str = DONE) -> RunResult:
    return RunResult.of(setting, seed, state, folder, measures=("lm_loss",))


@pytest.fixture
def results(tmp_path: Path) -> list[RunResult]:
    """Two settings of two seeds: 40 steps, so that means are of ten."""
    made = []
    for setting, shift in (("a", 0.0), ("b", 0.5)):
        for seed in (1, 2):
            losses = [9.0] * 20 + [3.0] * 10 + [4.0 + shift + seed] * 10
            folder = write_run(tmp_path / setting / str(seed), losses, {20: 4.0 + shift, 40: 5.0 + seed + shift})
            made.append(result(folder, setting, seed))
    return made


def test_last_and_best_of_a_run(results: list[RunResult]) -> None:
    assert results[0].num_steps == 40
    assert results[0].values == pytest.approx({
        "lm_loss, last": 5.0, "lm_loss, best": 3.0, "validation lm_loss, last": 6.0, "validation lm_loss, best": 4.0})


def test_a_short_run_a_reward_and_a_run_without_logs(tmp_path: Path) -> None:
    short = result(write_run(tmp_path / "short", [4.0, 2.0, 3.0], {}), "s", 1)
    assert short.values == {"lm_loss, last": 3.0, "lm_loss, best": 2.0}
    folder = write_run(tmp_path / "grpo", [0.0], {}, **{"grpo/reward": 0.25})
    with (folder / "tensorboard" / "metrics.jsonl").open("a") as file:
        file.writelines(f'{{"kind": "step", "iteration": {step}, "grpo/reward": {reward}}}\n'
                        for step, reward in ((2, 0.75), (3, 0.5)))
    found = RunResult.of("s", 1, DONE, folder, measures=measures_of("grpo", ()))
    assert found.values == {"grpo/reward, last": 0.5, "grpo/reward, best": 0.75}, "the best reward is the highest"
    assert result(tmp_path / "none", "s", 1).values == {} and result(tmp_path / "none", "s", 1).num_steps == 0
    assert measures_of("train", ()) == ("lm_loss",) and measures_of("grpo", ["x"]) == ("x",)


def test_the_spread_of_one_value_and_of_several() -> None:
    assert str(Spread.of([2.0])) == "2.0000"
    spread = Spread.of([1.0, 2.0, 6.0])
    assert (spread.mean, spread.least, spread.most, spread.num_runs) == (3.0, 1.0, 6.0, 3)
    assert spread.deviation == pytest.approx(7 ** 0.5) and str(spread) == "3.0000 ± 2.6458"


def test_the_table_has_a_line_a_setting_and_says_what_is_not_done(results: list[RunResult], tmp_path: Path) -> None:
    late = result(write_run(tmp_path / "late", [100.0] * 8, {}), "b", 3, "under way")
    lines = as_text([*results, late], base="a").splitlines()
    assert lines[0] == ("| setting | runs | lm_loss, last | lm_loss, best | validation lm_loss, last | validation "
                        "lm_loss, best | validation lm_loss, last, less a's |")
    assert lines[2] == "| a | 2 of 2 | 5.5000 ± 0.7071 | 3.0000 ± 0.0000 | 6.5000 ± 0.7071 | 4.0000 ± 0.0000 |  |"
    assert lines[3] == ("| b | 2 of 3 | 6.0000 ± 0.7071 | 3.0000 ± 0.0000 | 7.0000 ± 0.7071 | 4.5000 ± 0.0000 | "
                        "+0.5000 ± 0.0000 |"), "seed by seed: what the seeds differ by is no part of it"
    assert lines[-1] == f"b, seed 3: under way, 8 steps ({tmp_path / 'late'})"
    assert differences(results, "a", "lm_loss, last")["b"] == Spread(0.5, 0.0, 0.5, 0.5, 2)


def test_a_run_and_a_setting_in_files(results: list[RunResult]) -> None:
    settings = {"a": {"lr": 0.1, "data_path": ["x", "y"]}, "b": {"lr": 0.2}}
    rows = list(csv.DictReader(as_csv(results, settings).splitlines()))
    assert [(row["setting"], row["lr"], row["data_path"], row["seed"], row["state"]) for row in rows] == [
        ("a", "0.1", "x y", "1", DONE), ("a", "0.1", "x y", "2", DONE), ("b", "0.2", "", "1", DONE),
        ("b", "0.2", "", "2", DONE)]
    assert float(rows[3]["validation lm_loss, last"]) == 7.5
    content = as_json(results, settings)
    assert content["settings"][1]["results"]["lm_loss, last"] == {
        "mean": 6.0, "deviation": pytest.approx(0.5 ** 0.5), "least": 5.5, "most": 6.5, "num_runs": 2}
    assert json.loads(json.dumps(content))["runs"][0]["results"]["lm_loss, best"] == 3.0
