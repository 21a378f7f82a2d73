"""A tracker in a whole run of two processes: written by one of them, gone on with, and no end of the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import run_ranks
from tests.distributed.test_trainer import data as data
from tests.distributed.test_trainer import with_model, written_tags

pytestmark = pytest.mark.distributed


def calls(notes: Path, name: str) -> list[Any]:
    """What was given to the calls of a name, in order."""
    noted = [json.loads(line) for line in notes.read_text().splitlines()]
    assert {line["rank"] for line in noted} == {"0"}, "only the rank that writes TensorBoard's files"
    return [line["what"] for line in noted if line["call"] == name]


def test_a_run_and_its_resumption_are_one_run_of_the_tracker(data: list[str], tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    for part, steps in (("first", 3), ("second", 5)):
        run_ranks(2, "tests.distributed.stand_in_tracker", str(tmp_path / part), *with_model(
            *data, "--expert-model-parallel-size", "2", "--train-iters", str(steps), "--save", str(tmp_path / "saved"),
            "--resume", "auto", "--override-opt-param-scheduler", "--tensorboard-dir", str(logs), "--wandb-project",
            "pretraining"), timeout_s=180)
    begun = [calls(tmp_path / part, "init")[0] for part in ("first", "second")]
    assert begun[0] == begun[1] and begun[0]["project"] == "pretraining" and begun[0]["resume"] == "allow"
    assert begun[0]["name"] == f"tiny {begun[0]['id']}"

    scalars, pictures = set(), set()
    for part, expected in (("first", [2, 3]), ("second", [5])):  # each start's first row fails
        rows = calls(tmp_path / part, "log")
        assert [row["iteration"] for row in rows if "lm loss" in row] == expected
        assert calls(tmp_path / part, "finish") == [None] and calls(tmp_path / part, "config")
        scalars |= {tag for row in rows for tag, value in row.items() if value != "picture"}
        pictures |= {tag for row in rows for tag, value in row.items() if value == "picture"}
    written = written_tags(logs)
    assert scalars - {"iteration"} == {tag for kind, tag in written if kind == "scalar"}
    assert pictures <= {tag for kind, tag in written if kind in ("image", "histogram")}
