"""A rank that stops ends the run with every rank's stack and a non-zero code; one that is slow does not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from dsv3_megatron.data.indexed_writer import DatasetWriter
from tests.distributed.faulty_run import SLEEP_S, Fault
from tests.distributed.guarded_runs import guarded_run, whole_runs
from tests.distributed.launch import ROOT, RankError, run_ranks
from tests.distributed.small_run import architecture_arguments

pytestmark = pytest.mark.distributed

# Short against a test, long against a step on a machine that is busy with others.
TIMEOUT_S = 5.0
# Beyond the timeout: answers, the launcher's own shutdown, and a busy machine.
END_S = 60.0


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    prefix = tmp_path_factory.mktemp("data") / "train"
    with DatasetWriter(str(prefix), vocab_size=128) as writer:
        writer.add_documents(np.arange(3000) % 128, np.full(100, 30))
    return str(prefix)


def test_a_sleeping_rank_ends_the_run_under_torchrun(data: str, tmp_path: Path) -> None:
    faults = json.dumps([asdict(Fault("sleep", [3], rank=1, value=SLEEP_S))])
    arguments = [*architecture_arguments(guarded_run(data)), *(
        f"--seq-length 16 --micro-batch-size 1 --global-batch-size 4 --precision fp32 --train-iters 100 "
        f"--split 100,0,0 --eval-interval 0 --log-interval 1 --transformer-impl local --lr-warmup-iters 0 "
        f"--data-path {data} --tensorboard-dir {tmp_path} --hang-timeout-s {TIMEOUT_S}").split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
         "tests.distributed.faulty_run", faults, *arguments],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try:
        assert process.stdout is not None
        seen = ""
        for line in process.stdout:
            seen += line
            if "iteration   2/100" in line:
                break
        started = time.monotonic()
        rest, _ = process.communicate(timeout=TIMEOUT_S + END_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0 and TIMEOUT_S < time.monotonic() - started, seen + rest
    assert "exitcode  : 4" in rest
    summary = (tmp_path / "hang-summary.txt").read_text()
    assert summary in rest and "2 of 2 ranks answered. Furthest behind first:" in summary
    # Rank 1 sleeps before its first micro-batch; rank 0 is through both of its own and waits for rank 1's gradients.
    assert "\n  rank 1: step 3, begin of the step, silent for " in summary
    assert "\n  rank 0: step 3, micro-batch 2, silent for " in summary
    stacks = [(tmp_path / f"hang-rank-0000{rank}.txt").read_text() for rank in range(2)]
    assert "_fault_sleep" in stacks[1] and "_next_batch" in stacks[1]
    assert "in train_step" in stacks[0] and "_fault_sleep" not in stacks[0]
    assert "hang-rank-00000.txt" in rest and "hang-rank-00001.txt" in rest


def lock_up(data: str, folder: str) -> None:
    """Rank 1 enters a C function that keeps the interpreter's lock; what it writes goes to a file that stays."""
    rank = int(os.environ["RANK"])
    os.dup2(os.open(f"{folder}/stderr-{rank}", os.O_WRONLY | os.O_CREAT), 2)
    whole_runs(data, [("locked", {"hang_timeout_s": TIMEOUT_S}, [Fault("lock", [3], rank=1, value=SLEEP_S)])])


def test_a_rank_that_keeps_pythons_lock_ends_the_run(data: str, tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"exit code [14]"):
        run_ranks(2, lock_up, data, str(tmp_path), timeout_s=TIMEOUT_S + END_S)
    first, second = ((tmp_path / f"stderr-{rank}").read_text() for rank in range(2))
    assert "Timeout (0:00:" in second and "_fault_lock" in second, "faulthandler's timer has not fired"
    # Which of the two is first is open: rank 0 tells what it knows, or ends because rank 1 is gone.
    assert "1 of 2 ranks answered" in first and "rank 1: no answer" in first and "in train_step" in first


def test_slow_parts_are_no_hang(data: str, tmp_path: Path) -> None:
    """The first step and a validation that take longer than the timeout on one rank."""
    timeout_s = 3.0
    faults = [Fault("sleep", [1], rank=1, value=1.5 * timeout_s / 2),  # once for each of two micro-batches
              Fault("slow_validation", [3], rank=0, value=1.5 * timeout_s)]
    changes = {"hang_timeout_s": timeout_s, "train_iters": 3, "eval_interval": 2, "eval_iters": 1, "split": "80,20,0",
               "save": str(tmp_path / "saved")}
    for ranks in run_ranks(2, whole_runs, data, [("slow", changes, faults)]):
        assert ranks["slow"].code == 0 and ranks["slow"].latest == 3
