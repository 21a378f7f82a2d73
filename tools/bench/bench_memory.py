"""The memory estimate against reality: exact bytes of a real step's tensors on every rank, beside `estimate_memory`.

Each case trains two steps in processes of its own (gloo, one machine) and counts every tensor (`measured_memory.py`).
Compared are weights, main gradients, optimizer states, everything that is there between steps, and the peak of the
second step. Routing is the untrained routers' own: the estimate is told how many rows each rank's experts got relative
to the mean of its group, and nothing else that only a run can know.

Usage:
    python -m tools.bench.bench_memory [--presets tiny laptop] [--cases pp2 ep2 ...] [--explain]
appends to tools/bench/results/memory.csv and prints a table. On a GPU the processes count what the caching allocator
has allocated; that has not been run.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import pickle
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

REPOSITORY = Path(__file__).resolve().parents[2]
from dsv3_megatron.config.presets import preset  # noqa: E402
from dsv3_megatron.config.run import RunConfig  # noqa: E402
from dsv3_megatron.planning.memory.estimate import RankMemory, estimate_memory, kept_by_name  # noqa: E402
from dsv3_megatron.process.loopback import free_port  # noqa: E402
from dsv3_megatron.process.unpickling import load_own  # noqa: E402
from tools.bench.records import Measurement, append_rows  # noqa: E402

if TYPE_CHECKING:
    from tools.bench.measured_memory import MeasuredMemory

# A laptop's sequences are short here: what is compared does not get easier with their length.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"seq_length": 256, "micro_batch_size": 2, "global_batch_size": 16},
    "laptop": {"seq_length": 128, "micro_batch_size": 2, "global_batch_size": 8},
}
TP, PP, EP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size"
CP = "context_parallel_size"
SCHEDULE, VIRTUAL, RECOMPUTE = "pipeline_schedule", "num_virtual_stages_per_pipeline_rank", "recompute_granularity"


@dataclass(frozen=True)
class Case:
    """One run: its processes and its settings."""

    name: str
    world_size: int
    settings: dict[str, Any]

    def run(self, preset_name: str) -> RunConfig:
        """Of a preset, on local modules, without validation."""
        settings = {"transformer_impl": "local", "eval_interval": 0, "precision": "fp32", **SIZES[preset_name],
                    **self.settings}
        return preset(preset_name).override(**settings)


def _case(name: str, world_size: int, **settings: Any) -> Case:
    return Case(name, world_size, settings)


def _long(name: str, ranks: int, length: int, **settings: Any) -> Case:
    """Ranks that share a sequence, through a dense and a MoE layer: the step of a whole model of 32K takes minutes."""
    return _case(name, ranks, seq_length=length, micro_batch_size=1, global_batch_size=1, num_layers=2,
                 num_dense_layers=1, mtp_num_layers=0, max_position_embeddings=length, **{CP: ranks, **settings})


CASES = (
    _case("one process", 1),
    _case("one process, bf16", 1, precision="bf16"),
    _case("dp2", 2),
    _case("tp2", 2, **{TP: 2}),
    _case("ep2, bf16, bf16 moments, average", 2, precision="bf16", exp_avg_dtype="bf16", exp_avg_sq_dtype="bf16",
          ema_decay=0.999, **{EP: 2}),
    _case("pp2 1f1b", 2, **{PP: 2}),
    _case("pp2 interleaved, bf16", 2, precision="bf16", **{PP: 2, VIRTUAL: 2}),
    _case("pp2 zb1p, uneven, selective", 2, **{
        PP: 2, SCHEDULE: "zb1p", RECOMPUTE: "selective", "pipeline_model_parallel_layout": "uneven"}),
    _case("pp2 zbv, bf16", 2, precision="bf16", **{PP: 2, SCHEDULE: "zbv"}),
    _case("pp2 dualpipev", 2, **{PP: 2, SCHEDULE: "dualpipev"}),
    _case("pp2 dualpipe, bf16, selective", 2, precision="bf16", **{
        PP: 2, SCHEDULE: "dualpipe", RECOMPUTE: "selective"}),
    _case("pp2 1f1b, full", 2, **{PP: 2, RECOMPUTE: "full"}),
    _case("pp2 ep2 1f1b", 4, **{PP: 2, EP: 2}),
    _case("pp2 ep2 dualpipe, bf16", 4, precision="bf16", global_batch_size=16, **{PP: 2, EP: 2, SCHEDULE: "dualpipe"}),
    _case("pp2 tp2 dualpipev", 4, **{PP: 2, TP: 2, SCHEDULE: "dualpipev"}),
    _case("pp2 dualpipev, fp8", 2, precision="bf16", fp8="blockwise", **{PP: 2, SCHEDULE: "dualpipev"}),
    # One long sequence on ranks that share it; the ring of latents, and for one length the other ways too.
    *(_long(f"one long sequence, cp{ranks}", ranks, length) for length in (8192, 16384, 32768) for ranks in (1, 2, 4)),
    *(_long(f"one long sequence, cp2 {way}", 2, 8192, cp_comm_type=way) for way in ("all_gather", "a2a")),
    _long("one long sequence, cp2, latents in FP8", 2, 8192, cp_fp8_latents=True),
)
# Imported once, by the server that starts the processes.
_PRELOADED = ("torch", "torch.profiler", "megatron.core.transformer.moe.token_dispatcher", "megatron.core.optimizer",
              "megatron.core.dist_checkpointing")
UNEVEN = {"tiny": "Et|tttmL", "laptop": "Ettttt|tttmL"}


def run_of(case: Case, preset_name: str) -> RunConfig:
    """A case's valid run."""
    run = case.run(preset_name)
    if run.parallel.pipeline_model_parallel_layout == "uneven":
        run = run.override(pipeline_model_parallel_layout=UNEVEN[preset_name])
    run.validate(case.world_size)
    return run


def _process(rank: int, world_size: int, port: int, run: RunConfig, folder: str) -> None:
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"})
    warnings.simplefilter("ignore")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    # The profiler writes of itself to both.
    log = os.open(os.path.join(folder, f"log-{rank}"), os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import torch

    from tools.bench.measured_memory import measure

    torch.set_num_threads(1)
    measured = measure(run)
    Path(folder, f"rank-{rank}").write_bytes(pickle.dumps(measured))
    torch.distributed.barrier()


def measure_case(case: Case, preset_name: str) -> list[MeasuredMemory]:
    """What every rank of a case holds, by rank.

    Raises:
        Exception: what a process raised.
    """
    import multiprocessing

    import torch.multiprocessing

    multiprocessing.set_forkserver_preload(list(_PRELOADED))
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            _process, (case.world_size, port, run_of(case, preset_name), folder), nprocs=case.world_size,
            start_method="forkserver")
        return [load_own(Path(folder, f"rank-{rank}")) for rank in range(case.world_size)]


@dataclass(frozen=True)
class Comparison:
    """One rank's."""

    measured: MeasuredMemory
    estimated: RankMemory

    def pairs(self) -> dict[str, tuple[int, int]]:
        """(measured, estimated) bytes by component."""
        measured, estimated = self.measured, self.estimated
        return {
            "parameters": (measured.parameters, estimated.parameter_bytes),
            "gradients": (measured.gradients, estimated.gradient_bytes),
            "optimizer": (measured.optimizer, estimated.optimizer_bytes),
            "average": (measured.average, estimated.host_bytes),
            "state": (measured.state, estimated.state_bytes),
            "beyond_state": (measured.peak - measured.state, estimated.peak_bytes - estimated.state_bytes),
            "peak": (measured.peak, estimated.peak_bytes),
        }

    def error(self, component: str) -> float:
        """Relative, of the estimate; 0 where nothing is there."""
        measured, estimated = self.pairs()[component]
        return estimated / measured - 1 if measured else 0.0


def compare(run: RunConfig, world_size: int, measured: list[MeasuredMemory], *, device: str = "cpu",
            is_wide_product: bool = False) -> list[Comparison]:
    """Each rank with its estimate."""
    return [Comparison(each, estimate_memory(run, world_size, device=device, imbalance=each.imbalance,
                                             is_wide_product=is_wide_product)[each.pipeline_rank])
            for each in measured]


def has_wide_products() -> bool:
    """Whether this CPU multiplies bf16 matrices by way of fp32."""
    import torch

    from dsv3_megatron.ops.backend import choose_product_backend

    return choose_product_backend("auto", torch.device("cpu"), torch.bfloat16) == "via_fp32"


def explain(comparison: Comparison) -> None:
    """Print what is there at the peak: by the operations that made it, and by the estimate's names."""
    print(f"    peak in {comparison.estimated.peak_action}, kept micro-batches {comparison.estimated.num_kept}")
    for path, size in comparison.measured.at_peak:
        print(f"    {size / 1e6:10.3f} MB  {path[-100:]}")
    for name, size in list(kept_by_name(comparison.estimated).items())[:15]:
        print(f"    {size / 1e6:10.3f} MB  estimated: {name}")


def main() -> None:
    """Measure, compare, print a table, write the results."""
    import torch

    from dsv3_megatron.platform import prepare

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", choices=sorted(SIZES), default=["tiny", "laptop"])
    parser.add_argument("--cases", nargs="+", metavar="WORD", default=[""],
                        help="those with one of these in their name")
    parser.add_argument("--explain", action="store_true", help="print what is there at each peak")
    options = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr):
        name = prepare().name
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    is_wide = kind == "cpu" and has_wide_products()
    print("| Model | Case | rank | between steps | beside it at the peak | peak | estimated peak | error |\n"
          "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    for preset_name in options.presets:
        for case in CASES:
            if not any(word in case.name for word in options.cases):
                continue
            run = run_of(case, preset_name)
            found = compare(run, case.world_size, measure_case(case, preset_name), device=kind, is_wide_product=is_wide)
            rows = []
            for comparison in found:
                measured, estimated = comparison.measured, comparison.estimated
                print(f"| {preset_name} | {case.name} | {measured.rank} | {measured.state / 1e6:.2f} MB | "
                      f"{(measured.peak - measured.state) / 1e6:.2f} MB | {measured.peak / 1e6:.2f} MB | "
                      f"{estimated.peak_bytes / 1e6:.2f} MB | {comparison.error('peak'):+.2%} |", flush=True)
                if options.explain:
                    explain(comparison)
                training = run.training
                config = (f"{preset_name} seq={training.seq_length} batch={training.micro_batch_size}x"
                          f"{training.global_batch_size} ranks={case.world_size} rank={measured.rank}")
                for component, (real, guess) in comparison.pairs().items():
                    rows += [Measurement(case.name, config, component, real / 1e6, "MB"),
                             Measurement(case.name, config, f"{component}_estimated", guess / 1e6, "MB")]
            append_rows("memory.csv", rows, f"{'GPU' if kind == 'cuda' else 'CPU'} tensors, exact: {name}")


if __name__ == "__main__":
    main()
