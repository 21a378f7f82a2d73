"""An elastic run under its launcher: a node is killed, and the run goes on without it, no sample twice or left out.

The long form, with three nodes and twenty events, is `python -m tests.distributed.elastic_trial`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.elastic_trial import SEQ_LENGTH, Trial, check, finish, samples_by_step
from tests.distributed.launch import run_command

pytestmark = pytest.mark.distributed


def test_a_node_that_is_killed_is_left_out(tmp_path: Path) -> None:
    trial = Trial(tmp_path / "run", 12, batch=4, most_nodes=2, ranks=1, step_s=0.2, save_interval=2)
    try:
        trial.open()
        for node in range(2):
            trial.start(node)
        trial.wait_for_steps(3)
        assert trial.kill(1, "all") >= 3
        codes = finish(trial, 240.0)
    finally:
        trial.close()
    assert codes[0] == 0 and codes[1] != 0
    alone = Trial(tmp_path / "alone", 12, batch=4, ranks=1, save_interval=2)
    done = run_command("dsv3_megatron", "train", *alone.flags())
    assert done.returncode == 0, done.stderr
    check(trial, codes, alone.records())
    _, starts = samples_by_step(trial)
    assert {start.partition("/")[2] for start in starts} == {"1", "2"}, "steps of both sizes count"
    assert SEQ_LENGTH * 4 * 12 == trial.records()[-1]["consumed_tokens"]
