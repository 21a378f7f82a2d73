"""Whole runs under one pipeline schedule and another: the same losses, validated, saved and resumed across them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dsv3_megatron.schedule.draw import read_trace
from tests.distributed.launch import run_ranks
from tests.distributed.test_trainer import MODEL, data, from_step_10, steps  # noqa: F401 - a fixture

pytestmark = pytest.mark.distributed

PP2 = ["--pipeline-model-parallel-size", "2", "--num-layers", "4", "--eval-interval", "5", "--eval-iters", "1"]
# fp32 sums in another order, grown over the steps; largest seen 1e-6.
TOLERANCE = 2e-5


def train(data: list[str], *arguments: str, num_ranks: int = 2) -> None:  # noqa: F811
    validated = [*data[:-1], "90,10,0"]
    run_ranks(num_ranks, "dsv3_megatron.train", *MODEL, *validated, *PP2, *arguments, timeout_s=180)


def validations(folder: Path) -> dict[int, float]:
    records: list[dict[str, Any]] = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {record["iteration"]: record["lm_loss"] for record in records if record["kind"] == "validation"}


@pytest.fixture(scope="module")
def plain(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """15 steps of 1F1B, saved at 10."""
    folder = tmp_path_factory.mktemp("plain")
    train(data, "--train-iters", "15", "--save", str(folder / "checkpoints"), "--save-interval", "10", "--keep-last",
          "0", "--tensorboard-dir", str(folder / "logs"))
    return folder


@pytest.mark.parametrize("schedule", ["zbv", "dualpipe"])
def test_another_schedule_learns_the_same(plain: Path, data: list[str], tmp_path: Path,  # noqa: F811
                                          schedule: str) -> None:
    """From the start; the trace of it is there."""
    trace = tmp_path / "trace.json"
    train(data, "--train-iters", "15", "--pipeline-schedule", schedule, "--tensorboard-dir", str(tmp_path / "logs"),
          "--trace-schedule", str(trace))
    compare(plain, tmp_path, range(1, 16))
    assert read_trace(trace)[0].schedule == schedule


def test_dualpipev_goes_on_from_1f1b(plain: Path, data: list[str], tmp_path: Path) -> None:  # noqa: F811
    train(data, "--train-iters", "15", "--pipeline-schedule", "dualpipev", "--tensorboard-dir",
          str(tmp_path / "logs"), *from_step_10(plain, tmp_path / "ten"))
    compare(plain, tmp_path, range(11, 16))


def compare(plain: Path, folder: Path, iterations: range) -> None:
    expected, found = steps(plain / "logs"), steps(folder / "logs")
    assert sorted(found) == list(iterations)
    for iteration in iterations:
        for name in ("lm_loss", "mtp_losses", "balance_loss", "grad_norm"):
            assert found[iteration][name] == pytest.approx(expected[iteration][name], rel=TOLERANCE), (iteration, name)
    for iteration, loss in validations(folder / "logs").items():
        assert loss == pytest.approx(validations(plain / "logs")[iteration], rel=TOLERANCE)
    assert 15 in validations(folder / "logs")
