"""The launcher of the other tests here: results by rank, the first error, no process left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch

from tests.distributed.launch import ROOT, RankError, run_command, run_ranks

pytestmark = pytest.mark.distributed


def sum_of_ranks(factor: int) -> tuple[int, float, int]:
    rank = torch.distributed.get_rank()
    total = torch.tensor(float(rank * factor))
    torch.distributed.all_reduce(total)
    return rank, total.item(), torch.get_num_threads()


def fail_on_rank_one() -> None:
    if torch.distributed.get_rank() == 1:
        raise ValueError("the first error")
    torch.distributed.barrier()


def die_on_rank_one() -> None:
    if torch.distributed.get_rank() == 1:
        os._exit(7)
    time.sleep(60)


def wait_for_ever() -> None:
    time.sleep(600)


def test_results_by_rank():
    assert run_ranks(2, sum_of_ranks, 10) == [(0, 10.0, 1), (1, 10.0, 1)]


def test_first_error_is_the_one_reported():
    with pytest.raises(RankError, match="(?s)rank 1 of 2 failed.*ValueError: the first error"):
        run_ranks(2, fail_on_rank_one)


def test_death_of_a_rank_ends_the_others():
    start = time.monotonic()
    with pytest.raises(RankError, match="rank 1 of 2 failed.*\n?.*exit code 7"):
        run_ranks(2, die_on_rank_one)
    assert time.monotonic() - start < 30


def test_timeout_shows_the_stacks():
    with pytest.raises(TimeoutError, match="(?s)did not end within 2.*wait_for_ever"):
        run_ranks(1, wait_for_ever, timeout_s=2)


def test_module_runs_with_torchrun_environment():
    outputs = run_ranks(2, "platform", "--help-is-not-a-flag")
    assert len(outputs) == 2 and all("Linux" in output for output in outputs)


@pytest.mark.parametrize(("ending", "code", "said"), [("none", 0, ""), ("three", 3, ""), ("text", 1, "why\n")])
def test_a_command_ends_as_under_python(ending, code, said):
    """After its threads and what it wants done at the end."""
    command = ["tests.distributed.told_to_end", ending]
    started = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False, cwd=ROOT)
    forked = run_command(*command)
    assert (forked.returncode, forked.stdout, forked.stderr) == (started.returncode, started.stdout, started.stderr)
    assert (code, f"['{ending}'] rank None of None\na thread\nthe end\n", said) == (
        forked.returncode, forked.stdout, forked.stderr)


def test_a_commands_error_is_told():
    done = run_command("tests.distributed.told_to_end", "raise")
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == "RuntimeError: as told"
    with pytest.raises(RankError, match="(?s)rank . of 2 failed.*exit code 1.*RuntimeError: as told"):
        run_ranks(2, "tests.distributed.told_to_end", "raise")


def test_ranks_of_a_command_have_torchruns_environment():
    assert run_ranks(2, "tests.distributed.told_to_end", "none") == [
        f"['none'] rank {rank} of 2\na thread\nthe end\n" for rank in range(2)]
