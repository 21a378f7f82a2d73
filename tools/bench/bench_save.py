"""What a save costs training: written while it waits, and written while it goes on; and what checksums cost a file.

One run trains on random tokens. In each round it takes some steps, then saves the same state twice: first while it
waits, then behind the steps that follow (--async-save). Timed are

    wait      what training waits for a save: of one behind training, the copy to memory, the questions after each step
              whether it is on disk, and the end
    on-disk   from its beginning until the checkpoint has its name
    step      steps while nothing is written, and steps while a checkpoint is

The first save behind training also makes the memory and starts the process, and is reported by itself. The files of
both saves are compared byte by byte. Then the file of one rank is written in three ways, in turns: with checksums by
block, as saves do; without any; and without them but with torch.save's own CRC-32, as releases before checksums did.

Usage:
    python -m tools.bench.bench_save --preset laptop --rounds 5 --threads 2
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from tools.bench.random_run import random_token_trainer
from tools.bench.records import Measurement, append_rows, load_average

if TYPE_CHECKING:
    from dsv3_megatron.checkpoint.background import BackgroundWriter
    from dsv3_megatron.config.run import RunConfig
    from dsv3_megatron.runs.trainer import Trainer

WAYS = ("checksums", "no-checksums", "crc32")


@dataclass
class Seconds:
    """What was timed, a list entry a time.

    Attributes:
        sync: Waits for a save while training waits.
        behind: Waits for a save behind training.
        on_disk: From the beginning of such a save to its end.
        steps: Steps while nothing was written.
        beside: Steps while a checkpoint was.
        ways: CPU seconds of writing one file, by way.
        walls: Seconds of the same.
        num_bytes: Bytes of a checkpoint.
    """

    sync: list[float] = field(default_factory=list)
    behind: list[float] = field(default_factory=list)
    on_disk: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)
    ways: dict[str, list[float]] = field(default_factory=lambda: {way: [] for way in WAYS})
    walls: dict[str, list[float]] = field(default_factory=lambda: {way: [] for way in WAYS})
    num_bytes: int = 0


def timed_step(trainer: Trainer) -> float:
    """Seconds of one step."""
    started = time.perf_counter()
    trainer.train_step()
    return time.perf_counter() - started


def save_twice(trainer: Trainer, folder: Path, background: BackgroundWriter, seconds: Seconds) -> None:
    """Save the state both ways, the second time behind steps, and compare the files.

    Raises:
        RuntimeError: they differ.
    """
    from dsv3_megatron.checkpoint.folder import RunProgress
    from dsv3_megatron.checkpoint.store import save_checkpoint, start_checkpoint

    progress = RunProgress(trainer.iteration, trainer.consumed_samples, trainer.consumed_tokens)
    given = (progress, trainer.run, trainer.chunks, trainer.optimizer, trainer.groups)
    started = time.perf_counter()
    at_once = save_checkpoint(folder / "sync", *given, keep_last=1)
    seconds.sync.append(time.perf_counter() - started)

    started = time.perf_counter()
    pending = start_checkpoint(folder / "behind", *given, keep_last=1, background=background)
    waited = time.perf_counter() - started
    while True:
        seconds.beside.append(timed_step(trainer))
        asked = time.perf_counter()
        is_over = pending.is_over()
        path = pending.finish() if is_over else None
        waited += time.perf_counter() - asked
        if path is not None:
            break
    seconds.behind.append(waited)
    seconds.on_disk.append(time.perf_counter() - started)
    names = [name.name for name in at_once.iterdir() if name.suffix == ".distcp"]
    seconds.num_bytes = sum(file.stat().st_size for file in at_once.iterdir())
    for name in names:
        if (at_once / name).read_bytes() != (path / name).read_bytes():
            raise RuntimeError(f"{name} of step {progress.iteration} is not the same in both saves")


def write_in_turns(trainer: Trainer, folder: Path, rounds: int, seconds: Seconds) -> None:
    """Write this rank's file in each of the ways."""
    from dsv3_megatron.checkpoint import writing
    from dsv3_megatron.checkpoint.run_state import sharded_state

    target = folder / "file"
    target.mkdir()
    shards = writing.plan_shards(sharded_state(trainer.chunks, trainer.optimizer, trainer.groups, is_loading=False),
                                 target, trainer.groups.dp_cp)
    inside: Any = shards._writer
    entries = (inside.objects, inside.tensors, inside.transforms)

    def plain() -> None:
        with open(target / "plain", "wb") as raw:
            writing.write_entries(raw, "plain", *entries)
            raw.flush()
            os.fsync(raw.fileno())

    def with_crc32() -> None:
        with mock.patch.object(writing, "without_crc32", contextlib.nullcontext):
            plain()

    actions = {"checksums": lambda: writing.write_shard_file(target / "summed", *entries), "no-checksums": plain,
               "crc32": with_crc32}
    for number in range(rounds):
        for way in WAYS[number % 3:] + WAYS[:number % 3]:
            wall, cpu = time.perf_counter(), time.process_time()
            actions[way]()
            seconds.ways[way].append(time.process_time() - cpu)
            seconds.walls[way].append(time.perf_counter() - wall)


def measure(run: RunConfig, rounds: int, steps: int) -> Seconds:
    """Train and save."""
    from dsv3_megatron.checkpoint.background import BackgroundWriter
    from dsv3_megatron.parallel.groups import destroy_groups

    trainer, seconds = random_token_trainer(run), Seconds()
    background = BackgroundWriter()
    with tempfile.TemporaryDirectory(prefix="bench-save-", dir=os.environ.get("BENCH_FOLDER")) as name:
        for _ in range(2):
            timed_step(trainer)
        for _ in range(rounds):
            seconds.steps += [timed_step(trainer) for _ in range(steps)]
            save_twice(trainer, Path(name), background, seconds)
        background.close()
        write_in_turns(trainer, Path(name), rounds, seconds)
    destroy_groups()
    return seconds


def report(seconds: Seconds, config: str) -> list[Measurement]:
    """Print what was found; return its numbers."""
    median = statistics.median
    sync, behind = median(seconds.sync), median(seconds.behind[1:] or seconds.behind)
    rows = [
        Measurement("save", config, "checkpoint_bytes", seconds.num_bytes, "B"),
        Measurement("save", config, "rounds", len(seconds.sync), "1"),
        Measurement("sync", config, "wait_median", sync, "s"),
        Measurement("sync", config, "wait_min", min(seconds.sync), "s"),
        Measurement("async", config, "wait_first", seconds.behind[0], "s"),
        Measurement("async", config, "wait_median", behind, "s"),
        Measurement("async", config, "wait_max", max(seconds.behind[1:] or seconds.behind), "s"),
        Measurement("async", config, "wait_share_of_sync", behind / sync, "1"),
        Measurement("async", config, "wait_share_of_sync_first", seconds.behind[0] / sync, "1"),
        Measurement("async", config, "on_disk_median", median(seconds.on_disk), "s"),
        Measurement("step", config, "without_save_median", median(seconds.steps), "s"),
        Measurement("step", config, "while_written_median", median(seconds.beside), "s"),
        Measurement("step", config, "while_written_steps", len(seconds.beside), "1"),
        Measurement("files", config, "equal_bytes", 1, "1"),
    ]
    for way in WAYS:
        rows += [Measurement(f"file-{way}", config, "cpu_median", median(seconds.ways[way]), "s"),
                 Measurement(f"file-{way}", config, "wall_median", median(seconds.walls[way]), "s"),
                 Measurement(f"file-{way}", config, "wall_min", min(seconds.walls[way]), "s")]
    for row in rows:
        print(f"{row.name:18} {row.metric:26} {row.value:12.5g} {row.unit}")
    return rows


def main() -> int:
    """Measure and append to results/save.csv."""
    parser = argparse.ArgumentParser(description="Time what training waits for a save.")
    parser.add_argument("--preset", default="laptop", help="(%(default)s)")
    parser.add_argument("--batch-size", type=int, default=4, metavar="N", help="sequences of a step (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="without a save, in a round (%(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, metavar="N", help="(%(default)s)")
    parser.add_argument("--no-csv", action="store_true", help="print only")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    import torch

    from dsv3_megatron.config.presets import preset
    from dsv3_megatron.platform import prepare

    torch.set_num_threads(options.threads)
    run = preset(options.preset).override(
        micro_batch_size=options.batch_size, global_batch_size=options.batch_size, precision="fp32", eval_interval=0)
    config = f"{options.preset} fp32 seq={run.training.seq_length} batch={options.batch_size} one process"
    rows = report(measure(run, options.rounds, options.steps), config)
    if not options.no_csv:
        place = f"{prepare().name}, {options.threads} threads, load {load_average():.1f}"
        print(f"appended to {append_rows('save.csv', rows, place)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
