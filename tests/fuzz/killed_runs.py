"""Kills a run of four processes with SIGKILL at random moments, starts it again, and compares it with one that was not.

    python -m tests.fuzz.killed_runs --kills 100

The run has PP2 x EP2, a save of every second step behind training, and keeps two checkpoints. First it runs undisturbed
and writes every checkpoint while training waits, and keeps all: the reference. Then it lives in another folder, again
and again until it has been killed so often: each life goes on from the newest checkpoint there is, and ends at a random
moment after its first look at the folder, by the kill of one rank or of all. After each life

- the folder has a checkpoint that is whole, unless no save had been finished yet: every byte of its tensors is the
  reference's of that step, and `dsv3 verify` finds nothing; so has the one before, which is kept too;
- every step that the life logged has the reference's loss and gradient norm, to the last bit;
- no process of the life is left that writes checkpoints.

A life that comes to its end without being killed is compared with the reference's end, and the folder begins anew.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from dsv3_megatron.checkpoint.folder import Manifest, latest_iteration, read_manifest, saved_iterations
from dsv3_megatron.checkpoint.tensor_index import read_index
from dsv3_megatron.commands.verify import verify_checkpoint
from tests.distributed.launch import RankError, run_ranks
from tests.distributed.small_run import small_run
from tests.made_up_texts import write_texts

NUM_STEPS, INTERVAL = 16, 2
CHANGES = {"num_layers": 2, "expert_model_parallel_size": 2, "split": "100,0,0", "eval_interval": 0, "lr": 3e-3,
           "train_iters": NUM_STEPS, "lr_warmup_iters": 0, "log_interval": 100, "save_interval": INTERVAL}
# Processes by stages of the pipeline.
NUM_RANKS = {1: 2, 2: 4}
# Variable that the processes of a life have in their environment.
MARK = "KILLED_RUNS_MARK"
# Of a kill: the number of a rank, or all of them.
ALL = -1


@dataclass
class Lives:
    """What became of a run that was killed again and again.

    Attributes:
        killed: Lives by who was killed.
        completed: Lives that came to the end of the run.
        found: Lives by the newest checkpoint that they left; -1: none.
        steps: Steps that were compared with the reference's.
        checkpoints: Checkpoints that were compared with the reference's, byte for byte.
        wrong: What was not as it must be.
    """

    killed: Counter[int] = field(default_factory=Counter)
    completed: int = 0
    found: Counter[int] = field(default_factory=Counter)
    steps: int = 0
    checkpoints: int = 0
    wrong: list[str] = field(default_factory=list)


def live(data: str, folder: Path, changes: dict[str, Any], kill: tuple[int, float] | None) -> float:
    """One rank's part of a life, from the newest checkpoint to the end or the kill; seconds that training took."""
    from dsv3_megatron.runs.trainer import Trainer

    run = small_run(data_path=[data], save=str(folder / "saved"), load=str(folder / "saved"),
                    tensorboard_dir=str(folder / "logs"), **CHANGES, **changes)
    run.validate(NUM_RANKS[run.parallel.pipeline_model_parallel_size])
    trainer = Trainer(run)
    if kill is not None and kill[0] in (ALL, trainer.rank):
        timer = threading.Timer(kill[1], os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
    started = time.monotonic()
    with mock.patch("dsv3_megatron.runs.trainer.destroy_groups"):  # `run_ranks` wants them at the end
        assert trainer.train() == 0
    return time.monotonic() - started


def logged_steps(folder: Path) -> dict[int, tuple[Any, Any]]:
    """Loss and gradient norm by step; a line that a kill cut short is left out."""
    path = folder / "logs" / "metrics.jsonl"
    if not path.exists():
        return {}
    *lines, _cut = path.read_text(encoding="utf-8").split("\n")
    records = [json.loads(line) for line in lines]
    return {record["iteration"]: (record["lm_loss"], record["grad_norm"]) for record in records
            if record["kind"] == "step"}


def compare(folder: Path, reference: Path, lives: Lives) -> None:
    """Take in what a life has left."""
    expected = logged_steps(reference)
    for step, values in logged_steps(folder).items():
        lives.steps += 1
        if values != expected[step]:
            lives.wrong.append(f"step {step} has loss and norm {values}, not {expected[step]}")
    saved = folder / "saved"
    latest = latest_iteration(saved)
    lives.found[-1 if latest is None else latest] += 1
    if latest is None:
        return
    for step in saved_iterations(saved):
        damages = verify_checkpoint(saved, step, 1)["damages"]
        lives.wrong += [f"the checkpoint of {step} is damaged: {damage}" for damage in damages]
        lives.wrong += differences(read_manifest(saved, step), read_manifest(reference / "saved", step))
        lives.checkpoints += 1


def differences(mine: Manifest, other: Manifest) -> list[str]:
    """What two checkpoints of one step differ in, file by file and entry by entry; empty: they have the same bytes."""
    step = mine.progress.iteration
    names, others = ({path.name for path in each.path.iterdir()} for each in (mine, other))
    if names != others:
        return [f"the checkpoint of {step} has {sorted(names)}, not {sorted(others)}"]
    found = []
    # The manifest names the run, and the index has a random mark of the save; both are proved by `verify_checkpoint`.
    for name in sorted(names - {"checkpoint.json", ".metadata"}):
        one, two = ((each.path / name).read_bytes() for each in (mine, other))
        if one != two:
            places = {index.fqn: place for index, place in read_index(mine).storage_data.items()
                      if place.relative_path == name}
            found += [f"{name} of {step} is not the reference's: {len(one)} and {len(two)} bytes"] + [
                f"  {key}: {text}" for key, place in places.items()
                if (text := _difference(one, two, place.offset, place.offset + place.length))]
    return found


def _difference(one: bytes, two: bytes, start: int, stop: int) -> str:
    """How an entry of two files differs: how many bytes, from where to where, and the first of them."""
    left, right = (np.frombuffer(each[start:stop], dtype=np.uint8) for each in (one, two))
    if len(left) != len(right):
        return f"{len(left)} and {len(right)} bytes are there of {stop - start}"
    at = np.flatnonzero(left != right)
    if not len(at):
        return ""
    first, last = int(at[0]), int(at[-1])
    shown = slice(first, first + 16)
    return (f"{len(at)} of its {len(left)} bytes differ, from {first} to {last}: {left[shown].tobytes().hex()} and "
            f"{right[shown].tobytes().hex()}")


def left_over(mark: str) -> list[int]:
    """Process ids of what ranks have started, the processes that write: they have a mark in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{MARK}={mark}".encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:  # it has ended, or is another user's
            continue
    return found


def kill_again_and_again(folder: Path, kills: int, seed: int, *, stages: int = 2, max_seconds: float = float("inf"),
                         says: bool = False) -> Lives:
    """Run the reference, then the lives; what became of them.

    Args:
        folder: Empty folder for both.
        kills: Lives to end with SIGKILL.
        seed: Of the moments and of who is killed.
        stages: Of the pipeline: 2 with four processes, 1 with two.
        max_seconds: No life begins later than that.
        says: Print a line for each ten lives.
    """
    rng, lives = random.Random(seed), Lives()
    data, reference, subject = write_texts(folder / "data", 80), folder / "reference", folder / "killed"
    mark = f"{os.getpid()}-{seed}"
    deadline = time.monotonic() + max_seconds
    num_ranks, layout = NUM_RANKS[stages], {"pipeline_model_parallel_size": stages}
    length_s = max(run_ranks(num_ranks, live, data, reference, layout | {"async_save": False, "keep_last": 0}, None))
    while sum(lives.killed.values()) < kills and not lives.wrong and time.monotonic() < deadline:
        who, moment = rng.choice([ALL, *range(num_ranks)]), rng.uniform(0.0, 0.6 * length_s)
        try:
            run_ranks(num_ranks, live, data, subject, layout | {"keep_last": 2}, (who, moment),
                      environment={MARK: mark})
        except RankError as error:
            if "exit code -9" not in str(error) and "Connection" not in str(error):
                raise
            lives.killed[who] += 1
        else:
            lives.completed += 1
        compare(subject, reference, lives)
        if left_over(mark):
            time.sleep(5)
            lives.wrong += [f"process {pid} of a life still writes checkpoints" for pid in left_over(mark)]
        if latest_iteration(subject / "saved") == NUM_STEPS:
            shutil.rmtree(subject)
        if says and sum(lives.killed.values()) % 10 == 0:
            print(f"{sum(lives.killed.values())} killed, {lives.completed} completed, {lives.steps} steps compared",
                  flush=True)
    return lives


def main() -> int:
    """Kill so many lives and print what became of them; 0 if all was as it must be."""
    parser = argparse.ArgumentParser(description="Kill a run again and again, and compare it with one that was not.")
    parser.add_argument("--kills", type=int, default=100, metavar="N", help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(%(default)s)")
    parser.add_argument("--max-seconds", type=float, default=float("inf"), metavar="S", help="no life begins later")
    options = parser.parse_args()
    started = time.perf_counter()
    folder = Path(tempfile.mkdtemp(prefix="killed-runs-"))
    try:
        lives = kill_again_and_again(folder, options.kills, options.seed, max_seconds=options.max_seconds, says=True)
    except BaseException:
        print(f"the folders are kept in {folder}", flush=True)
        raise
    print(f"killed: {sum(lives.killed.values())} lives, by rank {dict(sorted(lives.killed.items()))} ({ALL}: all)")
    print(f"completed: {lives.completed}; newest after a life {dict(sorted(lives.found.items()))} (-1: none)")
    print(f"steps compared: {lives.steps}, checkpoints {lives.checkpoints}; {time.perf_counter() - started:.0f} s")
    if not lives.wrong:
        shutil.rmtree(folder)
        return 0
    for text in lives.wrong:
        print(f"WRONG: {text}")
    print(f"the reference's folder and the life's are kept in {folder}")
    return 1


if __name__ == "__main__":
    from tests.fuzz import killed_runs  # by its name, so that the ranks find it

    sys.exit(killed_runs.main())
