"""Steps of `laptop` with the experts on four ranks, under the dispatcher of a row for each expert and that of nodes.

All processes have both trainers and take their steps in turns, so that whatever else the machine does disturbs both.
The four ranks are two nodes of two, as far as the second dispatcher is concerned; every transfer is gloo's over
loopback. Beside the seconds of a step there are the processors' seconds of all four processes together: they are
what four processes compete for on fewer cores, and another program's work hardly changes them.

Usage:
    torchrun --standalone --nproc-per-node 4 -m tools.bench.bench_dispatchers
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
from tools.bench.records import Measurement, append_rows, warn_of_load  # noqa: E402

NUM_RANKS = 4
DISPATCHERS = ("alltoall", "node")
SUMMARIES: dict[str, Callable[[list[float]], float]] = {"median": statistics.median, "min": min, "max": max}


def measure(rounds: int, sequences: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds of the slowest rank and processors' seconds of all ranks, for each step, by dispatcher."""
    import torch
    from megatron.core import parallel_state

    from dsv3_megatron.config.presets import laptop
    from tools.bench.random_run import random_token_trainer

    trainers: dict[str, Any] = {}
    for name in DISPATCHERS:
        if trainers:
            parallel_state.destroy_model_parallel()  # the groups stay, and the second trainer finds the same
        run = laptop().override(
            expert_model_parallel_size=NUM_RANKS, moe_token_dispatcher_type=name, ranks_per_node=2, precision="fp32",
            global_batch_size=sequences, micro_batch_size=1, train_iters=rounds + 1, lr_warmup_iters=0)
        run.validate(NUM_RANKS)
        trainers[name] = random_token_trainer(run)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in DISPATCHERS}
    for number in range(rounds + 1):
        for name in DISPATCHERS if number % 2 else DISPATCHERS[::-1]:
            torch.distributed.barrier()
            started, used = time.perf_counter(), time.process_time()
            trainers[name].train_step()
            cpu = torch.tensor(time.process_time() - used, dtype=torch.float64)
            seconds = torch.tensor(time.perf_counter() - started, dtype=torch.float64)
            torch.distributed.all_reduce(seconds, op=torch.distributed.ReduceOp.MAX)
            torch.distributed.all_reduce(cpu)
            if number:  # the first one warms up
                found[name].append((float(seconds), float(cpu)))
    return found


def report(found: dict[str, list[tuple[float, float]]], sequences: int) -> list[Measurement]:
    """Print the medians and their ratios; return the numbers."""
    config = f"laptop fp32 EP{NUM_RANKS} 2 nodes batch={sequences}"
    rows = []
    for index, unit in enumerate(("s", "cpu-s")):
        by_dispatcher = {name: [step[index] for step in steps] for name, steps in found.items()}
        ratios = [node / other for other, node in zip(by_dispatcher["alltoall"], by_dispatcher["node"], strict=True)]
        for name, values in by_dispatcher.items():
            print(f"{config} {name:8} {statistics.median(values):.2f} {unit} a step "
                  f"({min(values):.2f}-{max(values):.2f})")
            rows += [Measurement("dispatchers", f"{config} {name}", metric, summary(values), unit)
                     for metric, summary in SUMMARIES.items()]
        print(f"node over alltoall in {unit}, round by round: median {statistics.median(ratios):.3f} "
              f"({min(ratios):.3f}-{max(ratios):.3f})")
        rows += [Measurement("dispatchers", config, f"node_to_alltoall_{unit}_{metric}", summary(ratios), "1")
                 for metric, summary in SUMMARIES.items()]
    return [*rows, Measurement("dispatchers", config, "num_rounds", len(found["node"]), "1")]


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark on this rank."""
    parser = argparse.ArgumentParser(description="A step of laptop under two dispatchers.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sequences", type=int, default=8, help="global batch, a multiple of 4")
    parser.add_argument("--no-csv", action="store_true", help="print only")
    options = parser.parse_args(arguments)
    if os.environ.get("WORLD_SIZE") != str(NUM_RANKS):
        print(__doc__.partition("Usage:\n")[2].strip(), file=sys.stderr)
        return 2
    import torch

    from dsv3_megatron.parallel.groups import destroy_groups

    torch.set_num_threads(1)
    found = measure(options.rounds, options.sequences)
    if torch.distributed.get_rank() == 0:
        warn_of_load()
        rows = report(found, options.sequences)
        if not options.no_csv:
            path = append_rows("dispatchers.csv", rows, f"cpu, {NUM_RANKS} processes of 1 thread")
            print(f"appended to {path.relative_to(REPOSITORY)}")
    destroy_groups()
    return 0


if __name__ == "__main__":
    sys.exit(main())
