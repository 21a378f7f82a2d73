"""Whole runs under one pipeline schedule and another: the same losses, validated, saved and resumed across them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dsv3_megatron.certification.routing_notes import in_steps
from dsv3_megatron.schedule.draw import read_trace
from tests.distributed.test_trainer import (  # noqa: F401 - a fixture
    SCORE_ROUNDING,
    data,
    from_step_10,
    steps,
    train_noted,
)
from tests.routing import compare_routing, read_notes

pytestmark = pytest.mark.distributed

# AdamW moves an element by lr times gradient over root of second moment. At a rare token's first step that is lr times
# the gradient's sign, also where the gradient is nothing but rounding, unless epsilon is well above rounding.
PP2 = ["--pipeline-model-parallel-size", "2", "--num-layers", "4", "--eval-interval", "5", "--eval-iters", "1",
       "--adam-eps", "1e-5"]
# fp32 sums in another order, grown over the steps, with equal choices of experts; largest seen 3e-6.
TOLERANCE = 2e-5


def train(data: list[str], folder: Path, *arguments: str, given: Path | None = None) -> None:  # noqa: F811
    """Two ranks, with logs and notes of their routing in `folder`, and choices as noted in `given`."""
    train_noted(2, folder, given, *data[:-1], "90,10,0", *PP2, *arguments)


def validations(folder: Path) -> dict[int, float]:
    records: list[dict[str, Any]] = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {record["iteration"]: record["lm_loss"] for record in records if record["kind"] == "validation"}


@pytest.fixture(scope="module")
def plain(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """15 steps of 1F1B, saved at 10."""
    folder = tmp_path_factory.mktemp("plain")
    train(data, folder, "--train-iters", "15", "--save", str(folder / "checkpoints"), "--save-interval", "10",
          "--keep-last", "0")
    return folder


@pytest.mark.parametrize("schedule", ["zbv", "dualpipe"])
def test_another_schedule_learns_the_same(plain: Path, data: list[str], tmp_path: Path,  # noqa: F811
                                          schedule: str) -> None:
    """From the start; the trace of it is there."""
    trace = tmp_path / "trace.json"
    train(data, tmp_path, "--train-iters", "15", "--pipeline-schedule", schedule, "--trace-schedule", str(trace),
          given=plain)
    compare(plain, tmp_path, range(1, 16))
    assert read_trace(trace)[0].schedule == schedule


def test_dualpipev_goes_on_from_1f1b(plain: Path, data: list[str], tmp_path: Path) -> None:  # noqa: F811
    train(data, tmp_path, "--train-iters", "15", "--pipeline-schedule", "dualpipev",
          *from_step_10(plain, tmp_path / "ten"), given=plain)
    compare(plain, tmp_path, range(11, 16))


def compare(plain: Path, folder: Path, iterations: range) -> None:
    """Routing first: a run with a fault may have it there."""
    compare_routing(in_steps(read_notes(plain / "routing"), iterations), read_notes(folder / "routing"),
                    rounding=SCORE_ROUNDING, common_steps=iterations.start - 1)
    expected, found = steps(plain / "logs"), steps(folder / "logs")
    assert sorted(found) == list(iterations)
    for iteration in iterations:
        for name in ("lm_loss", "mtp_losses", "balance_loss", "grad_norm"):
            assert found[iteration][name] == pytest.approx(expected[iteration][name], rel=TOLERANCE), (iteration, name)
    for iteration, loss in validations(folder / "logs").items():
        assert loss == pytest.approx(validations(plain / "logs")[iteration], rel=TOLERANCE)
    assert 15 in validations(folder / "logs")
