"""Contenders of a benchmark, each a process of its own or several, whose steps alternate.

A disturbance of the machine meets all of them, and while one computes the others sleep. A contender is the benchmark's
own script started with `--serve SETTING`, which calls `serve`. Where its setting asks for several processes, each is
told its rank by torchrun's variables, all are told to take a step at once, and the step takes as long as the slowest.
One that has used its budget takes no more steps; a step above the limit is given up, and so is its contender. How many
steps a number rests on is for the results to say.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dsv3_megatron.process.loopback import free_port
from tools.bench.records import Measurement, append_rows, load_average, warn_of_load

# Takes one step; what it returns goes into the answer, its "seconds" and "cpu_seconds" in place of the whole step's.
Step = Callable[[], Mapping[str, float]]


class Setting(Protocol):
    """What one process measures: a dataclass of plain values."""

    @property
    def contender(self) -> str: ...

    @property
    def threads(self) -> int: ...


@dataclass
class Contender[S: Setting]:
    """One contender's processes, and the seconds of its timed steps; its CPU seconds are those of all processes."""

    setting: S
    processes: list[subprocess.Popen[str]]
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    spent_s: float = 0.0
    error: str = ""

    def step(self, is_timed: bool, budget_s: float, limit_s: float) -> None:
        """Take one step; a process that fails or exceeds the limit is noted and reported, not raised."""
        if self.error or (self.spent_s >= budget_s and self.seconds):
            return
        for process in self.processes:
            assert process.stdin is not None
            try:
                process.stdin.write("step\n")
                process.stdin.flush()
            except BrokenPipeError:
                pass  # its end is seen below
        deadline = time.monotonic() + limit_s
        reports = []
        for process in self.processes:
            assert process.stdout is not None
            if not select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                self._give_up(f"step above {limit_s:.0f} s, killed")
                return
            answer = process.stdout.readline()
            if not answer:
                self._give_up(f"process ended with code {process.wait()}")
                return
            reports.append(json.loads(answer))
        seconds = max(report["seconds"] for report in reports)
        self.spent_s += seconds
        if is_timed or self.spent_s >= budget_s:
            self.seconds.append(seconds)
            self.cpu_seconds.append(sum(report["cpu_seconds"] for report in reports))

    def _give_up(self, error: str) -> None:
        """Note what went wrong, and end what is left: processes that wait for one that is gone never answer."""
        self.error = error
        for process in self.processes:
            process.kill()

    def close(self) -> None:
        """End the processes; each reads the end of its input between two steps."""
        for process in self.processes:
            assert process.stdin is not None
            if process.poll() is None:
                process.stdin.close()
        for process in self.processes:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def serve(make_step: Callable[[], Step]) -> None:
    """Take a step for each line on standard input; answer with its time. Runs in a contender's process."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer
    step = make_step()
    for _line in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        told = step()
        report = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu, **told}
        answers.write(json.dumps(report) + "\n")
        answers.flush()


def measure[S: Setting](script: str, settings: list[S], *, steps: int, warm_up: int, budget_s: float, limit_s: float,
                        log: Any) -> list[Contender[S]]:
    """Alternate the contenders' steps.

    Args:
        script: The benchmark.
        settings: Dataclasses, one for each contender.
        steps: Timed steps of each.
        warm_up: Steps before them.
        budget_s: Seconds after which a contender stops.
        limit_s: Seconds until a step, or the start, is given up.
        log: File for what the contenders print.
    """
    contenders = [_start(script, setting, log) for setting in settings]
    try:
        for index in range(warm_up + steps):
            for contender in contenders:
                contender.step(index >= warm_up, budget_s, limit_s)
    finally:
        for contender in contenders:
            contender.close()
    return contenders


def add_arguments(parser: argparse.ArgumentParser, *, steps: int, warm_up: int, budget_s: float, limit_s: float
                  ) -> None:
    """Add the flags of `run_benchmark` and `--serve SETTING`, with these defaults."""
    parser.add_argument("--steps", type=int, default=steps, help="timed steps of each contender")
    parser.add_argument("--warm-up", type=int, default=warm_up, help="steps before them")
    parser.add_argument("--budget-s", type=float, default=budget_s, help="seconds after which a contender stops")
    parser.add_argument("--step-limit-s", type=float, default=limit_s, help="seconds until a step or start is given up")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--log", type=Path, default=Path(os.devnull), help="file for what the contenders print")
    parser.add_argument("--no-csv", action="store_true", help="print only")
    parser.add_argument("--serve", help=argparse.SUPPRESS)


def run_benchmark[S: Setting](script: str, groups: Iterable[list[S]],
                              report: Callable[[list[Contender[S]]], list[Measurement]], results: str,
                              options: argparse.Namespace) -> int:
    """Measure groups of contenders one after the other; print, and append what was measured.

    Args:
        script: The benchmark.
        groups: Settings that alternate with each other.
        report: Prints a group's table and returns its numbers.
        results: File of the results, such as "training_throughput.csv".
        options: Of `add_arguments`.

    Returns:
        Exit code: 1 if a contender failed.
    """
    from dsv3_megatron.platform import detect_device

    device = f"{detect_device().name}, {options.threads} threads"
    if (processes := getattr(options, "processes", 1)) > 1:
        device += f" in each of {processes} processes"
    warn_of_load()
    failed = False
    with options.log.open("w", encoding="utf-8") as log:
        for settings in groups:
            load = load_average()
            contenders = measure(script, settings, steps=options.steps, warm_up=options.warm_up,
                                 budget_s=options.budget_s, limit_s=options.step_limit_s, log=log)
            rows = report(contenders)
            failed |= any(contender.error for contender in contenders)
            if not options.no_csv:
                # Each contender computes with its own threads alone; what is more was other work.
                beside = f", load {load:.1f}" if load > 0.5 else ""
                print(f"appended to {append_rows(results, rows, device + beside)}")
    return int(failed)


def _start[S: Setting](script: str, setting: S, log: Any) -> Contender[S]:
    """Start a contender's processes, each with its own number of threads."""
    assert dataclasses.is_dataclass(setting) and not isinstance(setting, type)
    repository = str(Path(__file__).resolve().parents[2])  # a script's own folder alone would be looked through
    environment = {**os.environ, "OMP_NUM_THREADS": str(setting.threads), "PYTHONPATH": repository}
    command = [sys.executable, script, "--serve", json.dumps(dataclasses.asdict(setting))]
    size, port = getattr(setting, "processes", 1), free_port()

    def start(rank: int) -> subprocess.Popen[str]:
        place = {} if size == 1 else {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                                env=environment | place)

    return Contender(setting, [start(rank) for rank in range(size)])
