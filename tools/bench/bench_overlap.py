"""How much of the experts' all-to-alls hides behind compute when a forward and a backward pass take turns.

Two processes exchange rows through gloo. The four transfers of an MoE layer (dispatch and combine, there and back) are
made to last so long that together they take `--shares` times what the pair computes. Measured are a forward and a full
backward of another micro-batch: the compute alone (transfers of no extra length), one after the other with nothing
hidden (forward, input gradients, weight gradients), and in turns. In turns a pair should take the longer of compute and
communication: at share 1, half the time of one after the other.

"stand-in" segments sleep for a known time, so that two ranks need no core of their own. "real" ones are layers of the
`laptop` preset, whose time also depends on what else the machine does: every round measures all three. Under "levels"
the stand-in's rows go over two links, as the node dispatcher's do: over the network, then within the node, which takes
half as long, and home the other way round. Both are links of their own, and a thread passes the rows on; a transfer is
the whole way.

Usage:
    torchrun --standalone --nproc-per-node 2 -m tools.bench.bench_overlap
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
from tools.bench.records import Measurement, append_rows, warn_of_load  # noqa: E402

# Of the time of a transfer of two levels, the part within the node.
NODE_SHARE = 1 / 3
COMPUTE, ALONE, TURNS = "compute", "one_after_the_other", "in_turns"


@dataclass(frozen=True)
class Subject:
    """A chunk whose passes are measured.

    Attributes:
        name: For the results.
        chunk: A `ChunkRunner`.
        num_layers: MoE layers of it.
        channel: What its transfers go through.
        inputs: Its input and the gradient of its output; None where it has none.
        clear: Called between passes.
    """

    name: str
    chunk: Any
    num_layers: int
    channel: Any
    inputs: tuple[Any, Any]
    clear: Callable[[], None] = lambda: None

    @property
    def num_transfers(self) -> int:
        """Of a forward and a backward."""
        return 4 * self.num_layers


def stand_in(num_layers: int, unit_s: float) -> Subject:
    """Attention and experts of one unit each, forward, for inputs and for weights: a pair computes six a layer."""
    import torch

    from dsv3_megatron.parallel.exchange import Splits, post_all_to_all
    from tools.bench.timed_segments import Channel, Costs, TimedStage, WallClock

    clock, costs = WallClock(), Costs(unit_s, unit_s, unit_s)
    group = torch.distributed.group.WORLD
    assert group is not None
    channel = Channel(clock, post_all_to_all)
    stage = TimedStage(num_layers, costs, costs, clock, channel, Splits.of((2, 2), (2, 2), group))
    return Subject(f"stand-in layers={num_layers} unit={unit_s * 1e3:g}ms", stage, num_layers, channel,
                   (torch.ones(4, 8), torch.ones(4, 8)))


def levels(num_layers: int, unit_s: float) -> Subject:
    """The stand-in with a network and a link within the node."""
    import torch

    from dsv3_megatron.parallel.communicators import process_group
    from dsv3_megatron.parallel.exchange import Splits, post_all_to_all
    from tools.bench.timed_segments import Channel, Costs, TimedStage, TwoLevels, WallClock

    clock, costs = WallClock(), Costs(unit_s, unit_s, unit_s)
    network, node = (process_group(range(torch.distributed.get_world_size()), link) for link in ("network", "node"))
    channel = Channel(clock, post_all_to_all, node_group=node, node_share=NODE_SHARE)
    hops = Splits.of((2, 2), (2, 2), network), Splits.of((2, 2), (2, 2), node)
    stage = TimedStage(num_layers, costs, costs, clock, channel, hops[0], TwoLevels(hops))
    return Subject(f"stand-in of two levels layers={num_layers} unit={unit_s * 1e3:g}ms", stage, num_layers, channel,
                   (torch.ones(4, 8), torch.ones(4, 8)))


def real(num_layers: int, seq_length: int) -> Subject:
    """MoE layers of `laptop` as one stage with a small embedding and head, experts on two ranks."""
    import torch

    from dsv3_megatron.config.presets import laptop
    from dsv3_megatron.data.batches import Batch
    from dsv3_megatron.model.build import build_stages, wrap_stages
    from dsv3_megatron.model.losses import sum_losses
    from dsv3_megatron.model.stage.runner import ModelChunk
    from dsv3_megatron.parallel.exchange import post_all_to_all
    from dsv3_megatron.parallel.groups import create_groups
    from tools.bench.timed_segments import Channel, WallClock

    run = laptop().override(num_layers=num_layers, num_dense_layers=0, mtp_num_layers=0, vocab_size=1024,
                            seq_length=seq_length, micro_batch_size=1, global_batch_size=2, precision="fp32",
                            expert_model_parallel_size=2)
    run.validate(2)
    stages, config = build_stages(run, create_groups(run.parallel, 0), precision="fp32")
    (wrapped,) = wrap_stages(stages, config, stages[0].pg_collection)
    tokens = torch.randint(0, 1024, (1, seq_length + 1), generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(1, seq_length), torch.arange(seq_length)[None],
                  torch.zeros(1, dtype=torch.int64))
    channel = Channel(WallClock(), post_all_to_all)
    chunk = ModelChunk(wrapped, batch_of=lambda _: batch, data=run.data, post=channel,
                       loss_function=lambda batch, losses: sum_losses(batch.loss_mask_BS, losses, mtp_weight=0.0))

    def clear() -> None:
        chunk.take_reports()
        wrapped.zero_grad_buffer()

    return Subject(f"laptop fp32 EP2 layers={num_layers} seq={seq_length}", chunk, num_layers, channel, (None, None),
                   clear)


def measure(subject: Subject, shares: list[float], rounds: int) -> dict[float, dict[str, list[float]]]:
    """Seconds of each way, by share, on the slower rank; rounds of all three ways."""
    for _ in range(2):
        timed(subject, TURNS, 0.0)
    compute = statistics.median(timed(subject, COMPUTE, 0.0) for _ in range(rounds))
    found: dict[float, dict[str, list[float]]] = {}
    for share in shares:
        duration = share * compute / subject.num_transfers
        ways = {COMPUTE: 0.0, ALONE: duration, TURNS: duration}
        found[share] = {way: [] for way in ways} | {"communication": [duration * subject.num_transfers]}
        for _ in range(rounds):
            for way, duration_s in ways.items():
                found[share][way].append(timed(subject, way, duration_s))
    return found


def timed(subject: Subject, way: str, duration_s: float) -> float:
    """Seconds of a forward and a backward, the same on every rank: until the slower one is done."""
    import time

    import torch

    from dsv3_megatron.schedule.execute import take_turns

    chunk, (given, grad) = subject.chunk, subject.inputs
    subject.clear()
    subject.channel.duration_s = 0.0
    take_turns([chunk.forward_steps(0, given)])
    subject.channel.duration_s, before = duration_s, subject.channel.num_transfers
    torch.distributed.barrier()
    start = time.perf_counter()
    if way == TURNS:
        take_turns([chunk.backward_steps(0, grad, defer_weights=False), chunk.forward_steps(1, given)])
        chunk.backward_weight(0)
    else:
        take_turns([chunk.forward_steps(1, given)])
        take_turns([chunk.backward_steps(0, grad, defer_weights=True)])
        chunk.backward_weight(0)
    seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    assert subject.channel.num_transfers - before == subject.num_transfers
    torch.distributed.all_reduce(seconds, op=torch.distributed.ReduceOp.MAX)
    subject.channel.duration_s = 0.0
    take_turns([chunk.backward_steps(1, grad, defer_weights=False)])
    chunk.backward_weight(1)
    return float(seconds)


def report(subject: Subject, found: dict[float, dict[str, list[float]]]) -> list[Measurement]:
    """Print a table; return its numbers."""
    rows = []
    for share, seconds in found.items():
        config = f"{subject.name} communication/compute={share:g}"
        median = {way: statistics.median(values) for way, values in seconds.items()}
        longer = max(median[COMPUTE], median["communication"])
        ratio, alone = median[TURNS] / longer, median[ALONE] / longer
        spread = f"{min(seconds[TURNS]):.3f}-{max(seconds[TURNS]):.3f}"
        print(f"{config:64} compute {median[COMPUTE]:.3f} s, communication {median['communication']:.3f} s, one after "
              f"the other {median[ALONE]:.3f} s ({alone:.2f}x the longer), in turns {median[TURNS]:.3f} s ({spread}; "
              f"{ratio:.2f}x)")
        rows += [Measurement("overlap", config, f"{way}_median", value, "s") for way, value in median.items()]
        rows += [Measurement("overlap", config, f"{TURNS}_min", min(seconds[TURNS]), "s"),
                 Measurement("overlap", config, f"{TURNS}_max", max(seconds[TURNS]), "s"),
                 Measurement("overlap", config, f"{TURNS}_to_longer", ratio, "1"),
                 Measurement("overlap", config, f"{ALONE}_to_longer", alone, "1"),
                 Measurement("overlap", config, "num_rounds", len(seconds[TURNS]), "1")]
    return rows


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="All-to-alls hidden by compute: a forward & backward pair in turns.")
    parser.add_argument("--subjects", nargs="+", default=["stand-in", "levels", "real"],
                        choices=("stand-in", "levels", "real"))
    parser.add_argument("--shares", nargs="+", type=float, default=[0.5, 1.0], help="communication to compute")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=8, help="of the stand-in; the real stage has half of them")
    parser.add_argument("--unit-ms", type=float, default=10.0, help="a stand-in segment's forward")
    parser.add_argument("--seq-length", type=int, default=256, help="of the real stage")
    parser.add_argument("--no-csv", action="store_true", help="print only")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark on this rank."""
    options = _parse(arguments)
    if os.environ.get("WORLD_SIZE") != "2":
        print(__doc__.partition("Usage:\n")[2].strip(), file=sys.stderr)
        return 2
    import torch

    from dsv3_megatron.parallel.groups import destroy_groups, start_process_group
    from dsv3_megatron.platform import prepare

    device = prepare()
    torch.set_num_threads(1)
    start_process_group(device)
    is_reporter = torch.distributed.get_rank() == 0
    if is_reporter:
        warn_of_load()
    for name in options.subjects:
        subject = real(max(1, options.layers // 2), options.seq_length) if name == "real" else \
            {"stand-in": stand_in, "levels": levels}[name](options.layers, options.unit_ms / 1e3)
        found = measure(subject, options.shares, options.rounds)
        if is_reporter:
            rows = report(subject, found)
            if not options.no_csv:
                path = append_rows("overlap.csv", rows, f"{device.name}, 2 processes of 1 thread")
                print(f"appended to {path.relative_to(REPOSITORY)}")
    destroy_groups()
    return 0


if __name__ == "__main__":
    sys.exit(main())
