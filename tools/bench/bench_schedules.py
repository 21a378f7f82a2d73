"""Pipeline schedules on a wall clock: step time and bubble of the executor, of Megatron-Core, and of the simulator.

A model of `--stages` equal parts is cut for each schedule into as many stages as it has, on the same processes with the
same micro-batches. Its compute sleeps and its all-to-alls are timers (`timed_stages.py`), so a few cores are enough and
no model is needed. A pass has as much all-to-all as its forward has compute, about DeepSeek-V3's ratio; overlapped
pairs hide it, single passes do not. Megatron-Core's own 1F1B, interleaved 1F1B and interleaved 1F1B with the combined
plan, which overlaps pairs too (`timed_combined.py`), run stages of the same times.

The bubble is the time that a rank stands still in the step: the step time less the known times of its actions, of the
rank that waits longest. Each step is repeated and the fastest counts: what disturbs a machine only adds.

Usage:
    python -m tools.bench.bench_schedules --unit-ms 20 --repeats 3 [--charts docs]
"""

from __future__ import annotations

import argparse
import os
import pickle
import sys
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
from dsv3_megatron.process.loopback import free_port  # noqa: E402
from dsv3_megatron.process.unpickling import load_own  # noqa: E402
from dsv3_megatron.schedule.draw import plot_timeline  # noqa: E402
from dsv3_megatron.schedule.plan import Plan, build_plan  # noqa: E402
from dsv3_megatron.schedule.simulate import simulate  # noqa: E402
from dsv3_megatron.schedule.timeline import Timeline  # noqa: E402
from tools.bench.records import Measurement, append_rows, load_average  # noqa: E402

FORMS = ("1f1b", "interleaved", "interleaved with pairs", "zb1p", "zbv", "dualpipe", "dualpipev")
COMBINED = "megatron-core combined"
PEERS = {"megatron-core 1f1b": "1f1b", "megatron-core interleaved": "interleaved", COMBINED: "interleaved with pairs"}


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
        num_ranks: Processes.
        num_microbatches: Of a step.
        num_parts: Equal parts of the model.
        unit_s: Forward compute of a part; its two backward parts and its all-to-alls take as long each.
        repeats: Steps of each schedule.
    """

    num_ranks: int
    num_microbatches: int
    num_parts: int
    unit_s: float
    repeats: int


@dataclass(frozen=True)
class Outcome:
    """Of one schedule, milliseconds.

    Attributes:
        name: One of FORMS or PEERS.
        step_time: Measured, of the fastest step.
        simulated: By the simulator, transfers between ranks taking no time.
        busy: By rank, what its actions take by their known times.
        timeline: Measured, of the fastest step; empty for a peer.
    """

    name: str
    step_time: float
    simulated: float
    busy: tuple[float, ...]
    timeline: Timeline

    @property
    def bubble(self) -> float:
        """The longest wait of a rank."""
        return self.step_time - min(self.busy)


def plan_of(name: str, setting: Setting) -> Plan:
    """The plan of one of FORMS."""
    schedule = name.removesuffix(" with pairs")
    return build_plan(schedule, num_ranks=setting.num_ranks, num_microbatches=setting.num_microbatches,
                      is_overlapped=schedule != name)


def measure_rank(setting: Setting, names: list[str]) -> list[Outcome]:
    """Every schedule in turn, on one process of a started process group; the same on every rank."""

    from tools.bench.timed_peer import measure_megatron_core
    from tools.bench.timed_stages import ChunkTimes, busy_time, measure_plan, ring_channels, step_time

    channels = ring_channels([list(range(setting.num_ranks))])
    outcomes = []
    for name in names:
        plan = plan_of(PEERS.get(name, name), setting)
        unit = setting.unit_s
        times = ChunkTimes(unit, unit, unit, unit).scaled(setting.num_parts / plan.num_stages)
        costs = times.costs(plan.num_stages, is_sent_early=name not in PEERS or name == COMBINED)
        simulated = 1000.0 * float(simulate(plan, costs).step_time)
        busy = tuple(1000.0 * busy_time(plan, rank, costs) for rank in range(plan.num_ranks))
        timelines: list[Timeline] = []
        if name in PEERS:
            best = measure_megatron_core(plan, times, setting.repeats, is_combined=name == COMBINED)
        else:
            timelines = [measure_plan(plan, times, channels) for _ in range(setting.repeats)]
            timelines.sort(key=step_time)
            best = step_time(timelines[0])
        outcomes.append(Outcome(name, best, simulated, busy, timelines[0] if timelines else ()))
    return outcomes


def rows(setting: Setting, outcomes: list[Outcome]) -> list[Measurement]:
    """What goes into the results."""
    config = (f"P={setting.num_ranks} micro-batches={setting.num_microbatches} parts={setting.num_parts} "
              f"unit={1000 * setting.unit_s:g}ms")
    return [Measurement(outcome.name, config, metric, value, unit) for outcome in outcomes for metric, value, unit in (
        ("step_time", outcome.step_time, "ms"), ("simulated", outcome.simulated, "ms"),
        ("bubble", outcome.bubble, "ms"), ("repeats", setting.repeats, "steps"))]


def print_table(setting: Setting, outcomes: list[Outcome]) -> None:
    """For a reader."""
    print(f"{setting.num_ranks} ranks, {setting.num_microbatches} micro-batches, one part: forward, both parts of the "
          f"backward and each pass's all-to-all {1000 * setting.unit_s:g} ms; load average {load_average():.1f}")
    print(f"{'schedule':<26} {'stages':>6} {'step ms':>9} {'simulated':>9} {'ratio':>6} {'bubble ms':>10}")
    for outcome in outcomes:
        stages = plan_of(PEERS.get(outcome.name, outcome.name), setting).num_stages
        print(f"{outcome.name:<26} {stages:>6} {outcome.step_time:>9.1f} {outcome.simulated:>9.1f} "
              f"{outcome.step_time / outcome.simulated:>6.3f} {outcome.bubble:>10.1f}")


def draw(setting: Setting, outcomes: list[Outcome], folder: Path) -> None:
    """A chart of each measured schedule, and one that compares them."""
    folder.mkdir(parents=True, exist_ok=True)
    for outcome in outcomes:
        if outcome.timeline:
            plan = plan_of(outcome.name, setting)
            plot_timeline(plan, outcome.timeline, folder / f"schedule_{outcome.name.replace(' ', '_')}.png",
                          title=f"{outcome.name}, measured: step {outcome.step_time:.0f} ms")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ordered = sorted(outcomes, key=lambda outcome: -outcome.step_time)
    names = [outcome.name for outcome in ordered]
    figure, axes = plt.subplots(figsize=(8, 0.45 * len(names) + 1.2), dpi=110)
    axes.barh(names, [outcome.step_time - outcome.bubble for outcome in ordered], color="#3b76c4", label="work")
    axes.barh(names, [outcome.bubble for outcome in ordered], left=[o.step_time - o.bubble for o in ordered],
              color="#d1d5db", label="bubble of the rank that waits longest")
    axes.plot([outcome.simulated for outcome in ordered], names, "k|", markersize=14, label="simulated step")
    axes.set_xlabel("ms")
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.4, -0.12), ncols=3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(folder / "schedules.png")


def _process(rank: int, setting: Setting, names: list[str], port: int, results: str) -> None:
    import torch

    from dsv3_megatron.platform import prepare
    from tools.bench.bench_schedules import measure_rank as measure  # not __main__'s: results go between processes

    prepare()
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank,
                                         world_size=setting.num_ranks)
    outcomes = measure(setting, names)
    if rank == 0:
        Path(results).write_bytes(pickle.dumps(outcomes))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def run_processes(setting: Setting, names: list[str]) -> list[Outcome]:
    """Measure in processes of their own.

    Raises:
        Exception: what a process raised.
    """
    import tempfile

    import torch.multiprocessing

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "outcomes.pickle"
        torch.multiprocessing.start_processes(_process, (setting, names, port, str(results)),
                                              nprocs=setting.num_ranks, start_method="spawn")
        return load_own(results)


def main() -> int:
    """Measure, print, and append to results/schedules.csv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--microbatches", type=int, default=16)
    parser.add_argument("--parts", type=int, default=8, help="equal parts of the model")
    parser.add_argument("--unit-ms", type=float, default=20.0, help="forward compute of a part")
    parser.add_argument("--repeats", type=int, default=3, help="steps of each schedule")
    parser.add_argument("--charts", type=Path, help="folder for charts")
    parser.add_argument("--schedules", nargs="+", choices=(*FORMS, *PEERS), default=[*FORMS, *PEERS])
    options = parser.parse_args()
    setting = Setting(options.ranks, options.microbatches, options.parts, options.unit_ms / 1000, options.repeats)

    from dsv3_megatron.platform import detect_device

    outcomes = run_processes(setting, options.schedules)
    print_table(setting, outcomes)
    print(append_rows("schedules.csv", rows(setting, outcomes),
                      f"{detect_device().name}, load {load_average():.1f}"))
    if options.charts:
        draw(setting, outcomes, options.charts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
