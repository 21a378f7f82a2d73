"""What the instruments cost: steps of one trainer with them and without, in turns.

Four kinds of step are timed, each beside a bare one, which has neither clock nor writer:

    not-logged   the phases are timed, the step is a line of metrics.jsonl
    logged       the instruments look, and all scalars are written
    pictures     heat maps and histograms are drawn and written too

A run has them in the proportion that log_interval and picture_interval say; `all` is their cost in that proportion, as
a share of a bare step. It is measured in three ways. Every step has a bare one on both sides and is compared with their
mean, so that a slow drift of the machine cancels; medians of these differences are reported, of wall clock and of the
process's CPU time. Beside other work both are noise many times what is to be measured. So, third, the CPU time within
the instruments' and the writer's own functions is added up, with that of as many phases as a step has; it misses only
what they do to caches and to the waiting of other ranks.

Usage:
    python -m tools.bench.bench_instruments --presets tiny laptop --rounds 20 --threads 2
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

REPOSITORY = Path(__file__).resolve().parents[2]
from tools.bench.random_run import random_token_trainer  # noqa: E402
from tools.bench.records import Measurement, append_rows, load_average, warn_of_load  # noqa: E402

if TYPE_CHECKING:
    from dsv3_megatron.config.run import RunConfig
    from dsv3_megatron.metrics.writer import MetricsWriter
    from dsv3_megatron.runs.trainer import Trainer

NEVER = 1_000_000_000
KINDS = ("not-logged", "logged", "pictures")


class NoInstruments:
    """What the trainer calls, doing nothing."""

    @property
    def clock(self) -> NoInstruments:
        return self

    def phase(self, _name: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def waiting[T](self, items: Iterator[T], _name: str) -> Iterator[T]:
        return items

    def begin_step(self, _iteration: int) -> None:
        """Nothing."""

    def measure_gradients(self) -> None:
        """Nothing."""

    def end_step(self) -> None:
        """Nothing."""


class OwnTime:
    """CPU seconds within some functions."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def watch(self, owner: type, name: str) -> None:
        """Count the time within a method of a class."""
        method = getattr(owner, name)

        def timed(*arguments: Any, **options: Any) -> Any:
            started = time.process_time()
            try:
                return method(*arguments, **options)
            finally:
                self.seconds += time.process_time() - started

        setattr(owner, name, timed)


OWN_TIME = OwnTime()


def watch_the_instruments() -> None:
    """Have OWN_TIME count what they do; none of these calls another."""
    from dsv3_megatron.metrics.gradients import GradientNorms
    from dsv3_megatron.metrics.instruments import Instruments
    from dsv3_megatron.metrics.writer import MetricsWriter
    from dsv3_megatron.model.observation import HeadAgreement, RouterObserver

    for owner, name in ((RouterObserver, "observe"), (HeadAgreement, "observe"), (GradientNorms, "squares"),
                        (Instruments, "end_step"), (MetricsWriter, "write_step")):
        OWN_TIME.watch(owner, name)


def clock_time(num_phases: int) -> float:
    """CPU seconds that timing as many phases takes."""
    from dsv3_megatron.metrics.step_clock import StepClock

    clock = StepClock(("work",))
    started = time.process_time()
    for _ in range(1000):
        with clock.part("work"):
            pass
    return (time.process_time() - started) / 1000 * num_phases


@dataclass
class Kind:
    """One kind of step: what the trainer has in it, and its steps' seconds: wall clock, CPU, CPU of the instruments."""

    instruments: Any
    writer: MetricsWriter | None
    seconds: list[tuple[float, float, float]] = field(default_factory=list)

    def step(self, trainer: Trainer) -> None:
        """Take one."""
        trainer.instruments = self.instruments
        OWN_TIME.seconds = 0.0
        wall, cpu = time.perf_counter(), time.process_time()
        report, _ = trainer.train_step()
        if self.writer is not None:
            with self.instruments.clock.part("logging"):
                self.writer.write_step(report)
        self.seconds.append((time.perf_counter() - wall, time.process_time() - cpu, OWN_TIME.seconds))


def kinds_of(trainer: Trainer, folder: Path) -> dict[str, Kind]:
    """The kinds of step by name, the bare one first."""
    from dsv3_megatron.metrics.instruments import Instruments
    from dsv3_megatron.metrics.writer import MetricsWriter

    kinds = {"bare": Kind(NoInstruments(), None)}
    for name, (log_interval, picture_interval) in zip(KINDS, ((NEVER, 1), (1, NEVER), (1, 1)), strict=True):
        run = trainer.run.override(log_interval=log_interval, tensorboard_dir=str(folder / name))
        instruments = Instruments(run, trainer.chunks, trainer.optimizer, trainer.groups, trainer.device)
        writer = MetricsWriter(folder / name, trainer.speed, num_layers=run.model.num_layers,
                               log_interval=log_interval, picture_interval=picture_interval)
        kinds[name] = Kind(instruments, writer)
    return kinds


def extra(kinds: dict[str, Kind], name: str, which: int) -> float:
    """Median of what a step of this kind takes beyond the mean of the bare steps before and after it, seconds.

    Args:
        name: Of the kind; the steps of a round are bare, KINDS[0], bare, KINDS[1], bare, KINDS[2], and a last bare one.
        which: 0 wall clock, 1 CPU time, 2 the instruments' own.
    """
    bare = [seconds[which] for seconds in kinds["bare"].seconds]
    place = KINDS.index(name)
    differences = []
    for index, seconds in enumerate(kinds[name].seconds):
        before = index * len(KINDS) + place
        differences.append(seconds[which] - (bare[before] + bare[before + 1]) / 2)
    return statistics.median(differences)


def measure(run: RunConfig, rounds: int, warm_up: int) -> dict[str, Kind]:
    """Take the steps."""
    from dsv3_megatron.parallel.groups import destroy_groups

    trainer = random_token_trainer(run)
    with tempfile.TemporaryDirectory(prefix="bench-instruments-") as folder:
        kinds = kinds_of(trainer, Path(folder))
        for index in range(warm_up + rounds):
            if index == warm_up:
                for kind in kinds.values():
                    kind.seconds.clear()
            for name in KINDS:
                kinds["bare"].step(trainer)
                kinds[name].step(trainer)
        kinds["bare"].step(trainer)
        for kind in kinds.values():
            if kind.writer is not None:
                kind.writer.close()
    destroy_groups()
    return kinds


def report(kinds: dict[str, Kind], config: str, clock: float, log_interval: int, picture_interval: int
           ) -> list[Measurement]:
    """Print a table; return its numbers.

    Args:
        kinds: With their steps taken.
        config: What was measured.
        clock: CPU seconds that timing a step's phases takes.
        log_interval: Steps between logged ones.
        picture_interval: Logged steps between pictures.
    """
    bare = [statistics.median(column) for column in zip(*kinds["bare"].seconds, strict=True)]
    shares = {"not-logged": 1 - 1 / log_interval, "logged": (1 - 1 / picture_interval) / log_interval,
              "pictures": 1 / picture_interval / log_interval}
    rounds = len(kinds["logged"].seconds)
    print(f"{config}: bare step {bare[0]:.4f} s wall, {bare[1]:.4f} s CPU; {rounds} rounds")
    rows = [Measurement("bare", config, "step_time_median", bare[0], "s"),
            Measurement("bare", config, "step_cpu_time_median", bare[1], "s"),
            Measurement("bare", config, "num_steps", len(kinds["bare"].seconds), "1")]
    total = [0.0, 0.0, 0.0]
    for name in KINDS:
        extras = [extra(kinds, name, which) for which in (0, 1, 2)]
        extras[2] += clock
        total = [sum_ + shares[name] * more for sum_, more in zip(total, extras, strict=True)]
        wall, cpu, own = (1e3 * more for more in extras)
        print(f"  {name:12} {wall:+9.2f} ms wall  {cpu:+9.2f} ms CPU  {own:+9.2f} ms own CPU, "
              f"{100 * shares[name]:.0f}% of the steps")
        rows += [Measurement(name, config, "extra_time_median", extras[0], "s"),
                 Measurement(name, config, "extra_cpu_time_median", extras[1], "s"),
                 Measurement(name, config, "own_cpu_time_median", extras[2], "s"),
                 Measurement(name, config, "num_steps", rounds, "1")]
    overheads = [100 * more / step for more, step in zip(total, (bare[0], bare[1], bare[1]), strict=True)]
    print(f"  {'all':12} {overheads[0]:+9.3f} % wall {overheads[1]:+9.3f} % CPU {overheads[2]:+9.3f} % own CPU, "
          "of a bare step")
    metrics = ("overhead", "overhead_cpu", "overhead_own_cpu")
    return rows + [Measurement("all", config, metric, value, "%")
                   for metric, value in zip(metrics, overheads, strict=True)]


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What the instruments cost.")
    parser.add_argument("--presets", nargs="+", default=["tiny", "laptop"], choices=("tiny", "laptop"))
    parser.add_argument("--rounds", type=int, default=20, help="steps of each kind; each has a bare one beside it")
    parser.add_argument("--warm-up", type=int, default=2, help="rounds before them")
    parser.add_argument("--laptop-seq-length", type=int, default=512)
    parser.add_argument("--laptop-batch-size", type=int, default=4, help="sequences a step, in one micro-batch")
    parser.add_argument("--log-interval", type=int, default=10)
    parser.add_argument("--picture-interval", type=int, default=10)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--no-csv", action="store_true", help="print only")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark."""
    options = _parse(arguments)
    import torch

    from dsv3_megatron.config.presets import preset
    from dsv3_megatron.platform import prepare

    device = prepare()  # before anything imports Megatron-Core
    torch.set_num_threads(options.threads)
    watch_the_instruments()
    warn_of_load()
    for name in options.presets:
        run = preset(name).override(precision="fp32", eval_interval=0, train_iters=NEVER, log_interval=NEVER)
        if name == "laptop":
            batch = options.laptop_batch_size
            run = run.override(seq_length=options.laptop_seq_length, micro_batch_size=batch, global_batch_size=batch)
        config = (f"{name} fp32 seq={run.training.seq_length} batch={run.training.global_batch_size} "
                  f"threads={options.threads} log_interval={options.log_interval} "
                  f"picture_interval={options.picture_interval}")
        # Six phases, router-bias twice, and a wait for each micro-batch.
        clock = clock_time(7 + run.training.num_microbatches(1))
        rows = report(measure(run, options.rounds, options.warm_up), config, clock, options.log_interval,
                      options.picture_interval)
        if not options.no_csv:
            place = f"{device.name}, {options.threads} threads, load {load_average():.1f}"
            print(f"appended to {append_rows('instruments.csv', rows, place).relative_to(REPOSITORY)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
