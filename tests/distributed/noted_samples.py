"""`dsv3 train` that notes the samples of each micro-batch: what an elastic trial has torchrun start as its Python.

Of each micro-batch a line goes to $NOTED_SAMPLES/RANK-PID.jsonl: the time, the start that it is of, the samples
consumed before its step, its samples. $NOTED_STEP_S seconds are slept before each step, so that steps take about as
long with any load.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from dsv3_megatron.data.batches import Batch, BatchIterator


def note_samples(folder: Path, seconds: float) -> None:
    """Note what every iterator of this process yields from now on."""
    own = BatchIterator.__next__
    # Rank 0's port is a new one at each start.
    start = f"{os.environ.get('MASTER_PORT')}/{os.environ.get('WORLD_SIZE')}"
    file = (folder / f"{os.environ['RANK']}-{os.getpid()}.jsonl").open("w")
    last = -1

    def noted(self: BatchIterator) -> Batch:
        nonlocal last
        before = self.consumed_samples
        if before != last:
            time.sleep(seconds)
            last = before
        batch = own(self)
        file.write(json.dumps([time.time(), start, before, batch.sample_ids_B.tolist()]) + "\n")
        file.flush()
        return batch

    BatchIterator.__next__ = noted  # type: ignore[method-assign]


if __name__ == "__main__":
    note_samples(Path(os.environ["NOTED_SAMPLES"]), float(os.environ.get("NOTED_STEP_S", "0")))
    from dsv3_megatron.commands.dispatch import run

    sys.argv[0] = "dsv3"
    run()
