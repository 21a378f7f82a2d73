"""A stand-in for a run of `dsv3 train`: takes its steps in milliseconds, saves, goes on, and can be told to go wrong.

It keeps the parts of a run that a sweep sees: metrics.jsonl, a checkpoint every five steps, the end after a stop
signal, and its exit codes. Its losses are a formula of seed and learning rate, so that a sweep has one right table.
Each start appends a line to starts.log: its process, and the step that it goes on from.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

SAVE_INTERVAL = 5


def loss(lr: float, seed: int, step: int) -> float:
    """What the run "measures" in a step."""
    return 8.0 / (1 + 100 * lr * step) + 0.01 * seed


def main(words: list[str]) -> int:
    """Take the steps that are left."""
    flags = dict(zip(words[1::2], words[2::2], strict=True))
    save, logs = Path(flags["--save"]), Path(flags["--tensorboard-dir"])
    steps, seed, lr = int(flags["--train-iters"]), int(flags["--seed"]), float(flags["--lr"])
    for folder in (save, logs):
        folder.mkdir(parents=True, exist_ok=True)
    stopped = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    checkpoint = save / "step"
    step = int(checkpoint.read_text()) if checkpoint.exists() else 0
    with (save.parent / "starts.log").open("a") as file:
        file.write(f"{os.getpid()} {step}\n")
    wrong = os.environ.get("STUB_WRONG", "").split(":")
    metrics = logs / "metrics.jsonl"
    kept = metrics.read_text().splitlines(keepends=True)[:step] if metrics.exists() else []
    metrics.write_text("".join(kept))
    while step < steps and not stopped:
        step += 1
        time.sleep(float(os.environ.get("STUB_STEP_S", "0.002")))
        with metrics.open("a") as file:
            file.write(json.dumps({"kind": "step", "iteration": step, "lm_loss": loss(lr, seed, step)}) + "\n")
        if step % SAVE_INTERVAL == 0 or step == steps:
            checkpoint.write_text(str(step))
        if wrong[0] == flags["--lr"]:
            print("error: the stand-in was told to go wrong", flush=True)
            return int(wrong[1])
    if step < steps:
        if os.environ.get("STUB_SAVES_AT_STOP") == "1":
            checkpoint.write_text(str(step))
        return int(os.environ["DSV3_STOPPED_CODE"])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
