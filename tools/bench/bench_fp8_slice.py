"""A slice of DeepSeek-V3 on one GPU, trained in BF16 and in FP8: step time, model TFLOP/s, memory, their ratios.

The slice has V3's widths and heads and few layers: one dense layer, the rest with as many experts as fit, each token
choosing eight of them. Smaller than V3's are the vocabulary (the head is never in FP8, and would be most of the slice)
and MTP (none). A step is the trainer's own on random tokens: BF16 moments, FP32 gradients and master weights, clipping,
bias update, and the report's selective recomputation.

    bf16       local modules
    fp8        local modules, --fp8 blockwise; the backend that auto chooses: triton on Hopper
    te-bf16    Transformer Engine's modules, where installed
    te-fp8     and with its block scaling

Each contender is a process of its own, one after the other: each needs the whole GPU. Rows go to
results/fp8_slice.csv. The target is an FP8 step of 1.3 times the BF16 step's speed on an H100 or H200. It has not been
measured yet: not run on a GPU. On a CPU `--smoke` runs the same on narrow widths and shows that it works, not how fast.

Usage:
    python -m tools.bench.bench_fp8_slice --layers 3 --micro-batch-size 4
    python -m tools.bench.bench_fp8_slice --device cpu --smoke --no-csv
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

REPOSITORY = Path(__file__).resolve().parents[2]
from dsv3_megatron.config.packages import is_installed  # noqa: E402
from tools.bench.records import Measurement, append_rows  # noqa: E402

if TYPE_CHECKING:
    from dsv3_megatron.config.run import RunConfig

_FP8 = {"fp8": "blockwise"}
CONTENDERS: dict[str, dict[str, Any]] = {
    "bf16": {"transformer_impl": "local", "fp8": "none"},
    "fp8": {"transformer_impl": "local", **_FP8},
    "te-bf16": {"transformer_impl": "transformer_engine", "fp8": "none"},
    "te-fp8": {"transformer_impl": "transformer_engine", **_FP8},
}
TARGET_SPEEDUP = 1.3
# Of a parameter: weight in BF16, gradient and master weight in FP32, two moments in BF16, two layouts in FP8.
BYTES_PER_PARAMETER = 2 + 4 + 4 + 2 * 2 + 2 * 1
# What else needs memory: activations, logits, exchanged rows, the allocator's gaps.
SHARE_FOR_PARAMETERS = 0.65
SMOKE = {"hidden_size": 128, "num_attention_heads": 4, "q_lora_rank": 64, "kv_lora_rank": 32, "qk_nope_head_dim": 32,
         "qk_rope_head_dim": 16, "v_head_dim": 32, "ffn_hidden_size": 256, "moe_ffn_hidden_size": 128,
         "vocab_size": 512, "num_layers": 2, "num_experts": 16, "seq_length": 64, "max_position_embeddings": 64,
         "original_max_position_embeddings": 64}


@dataclass(frozen=True)
class Result:
    """What one contender did.

    Attributes:
        seconds: Of each timed step.
        peak_bytes: Of the GPU's memory as torch allocated it; on a CPU the process's largest resident size.
        loss: After the last step, nats per token.
        device: Its name.
        backend: What computed FP8; "" without.
    """

    seconds: list[float]
    peak_bytes: int
    loss: float
    device: str
    backend: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def slice_run(options: argparse.Namespace, contender: str, num_experts: int) -> RunConfig:
    """The run of one contender: V3's preset with few layers, or narrow widths for `--smoke`."""
    from dsv3_megatron.config.presets import preset

    shape = {"num_layers": options.layers, "num_experts": num_experts, "vocab_size": options.vocab_size,
             "seq_length": options.seq_length, **(SMOKE if options.smoke else {})}
    return preset("dsv3-671b").override(**{
        "num_dense_layers": 1, "mtp_num_layers": 0, "pipeline_model_parallel_size": 1, "pipeline_schedule": "1f1b",
        "expert_model_parallel_size": 1, "phases": (), "stop_after_phase": None, "train_iters": 1000, "lr": 1e-4,
        "min_lr": 1e-4, "lr_decay_style": "constant", "ema_decay": 0.0, "eval_interval": 0, "precision": "bf16",
        "micro_batch_size": options.micro_batch_size,
        "global_batch_size": options.micro_batch_size * options.num_microbatches,
        "recompute_granularity": "selective", **shape, **CONTENDERS[contender]})


def experts_that_fit(options: argparse.Namespace, memory_bytes: int) -> int:
    """The most experts a layer, in whole groups of the router, whose training fits a share of the memory.

    Raises:
        SystemExit: Not even two for each group.
    """
    from dsv3_megatron.metrics.parameters import count_parameters

    model = slice_run(options, "bf16", 16).model
    groups, best = model.moe_router_num_groups or 1, 0
    budget = SHARE_FOR_PARAMETERS * memory_bytes
    for count in range(2 * groups, 257, groups):
        parameters = count_parameters(slice_run(options, "bf16", count).model).total
        if parameters * BYTES_PER_PARAMETER > budget:
            break
        best = count
    if not best:
        raise SystemExit(f"a slice of {options.layers} layers with {2 * groups} experts does not fit "
                         f"{memory_bytes / 1e9:.0f} GB; give fewer --layers")
    return best


def measure_here(options: argparse.Namespace, contender: str, num_experts: int) -> Result:
    """Train a contender in this process."""
    from dsv3_megatron.platform import prepare

    device = prepare()
    import torch

    from tools.bench.random_run import random_token_trainer

    run = slice_run(options, contender, num_experts)
    trainer = random_token_trainer(run)
    backend = ""
    if run.fp8.is_enabled:
        from dsv3_megatron.ops.fp8.choice import resolve_fp8_backend

        backend = resolve_fp8_backend("auto", transformer_impl=run.training.transformer_impl)
    seconds, loss = [], 0.0
    for index in range(options.warm_up + options.steps):
        if device.is_cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        loss = trainer.train_step()[0].lm_loss or 0.0
        if device.is_cuda:
            torch.cuda.synchronize()
        if not math.isfinite(loss):
            raise ArithmeticError(f"the loss of step {index + 1} is {loss}")
        if index >= options.warm_up:
            seconds.append(time.perf_counter() - started)
    return Result(seconds, _peak_bytes(device.is_cuda), loss, device.name, backend)


def _peak_bytes(is_cuda: bool) -> int:
    if is_cuda:
        import torch

        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_alone(arguments: list[str], contender: str, num_experts: int) -> Result | None:
    """Train a contender in a process of its own; None, with its last words on standard error, where that failed."""
    command = [sys.executable, __file__, *arguments, "--serve", contender, "--experts", str(num_experts)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{contender}: ended with code {done.returncode}: {' '.join(done.stderr.splitlines()[-3:])}",
              file=sys.stderr)
        return None
    return Result(**json.loads(done.stdout.splitlines()[-1]))


def config_text(options: argparse.Namespace, run: RunConfig) -> str:
    """The slice's sizes, as the results have them."""
    model, training = run.model, run.training
    return (f"V3 slice{' smoke' if options.smoke else ''} hidden={model.hidden_size} layers={model.num_layers} "
            f"experts={model.num_experts} seq={training.seq_length} micro={training.micro_batch_size} "
            f"micro-batches={options.num_microbatches}")


def compare_memory(options: argparse.Namespace, name: str, num_experts: int, result: Result) -> list[tuple[str, float]]:
    """Print a contender's peak beside what was planned and rehearsed for it; return the ratios."""
    from tools.bench.slice_memory import planned_bytes, rehearsed_bytes

    run = slice_run(options, name, num_experts)
    ratios = [("peak_memory against planner", result.peak_bytes / planned_bytes(run))]
    rehearsed = rehearsed_bytes(name, config_text(options, run))
    if rehearsed is not None:
        ratios.append(("peak_memory against rehearsal", result.peak_bytes / rehearsed))
    print(f"         {result.peak_bytes / 1e9:.2f} GB: " + ", ".join(
        f"{ratio:.3f} of the {what.rpartition(' ')[2]}'s" for what, ratio in ratios)
        + ("" if rehearsed is not None else "; not rehearsed (tools/bench/slice_memory.py)"))
    return ratios


def report(options: argparse.Namespace, results: dict[str, Result], num_experts: int) -> list[Measurement]:
    """Print a table, and whether the target is met; return its numbers."""
    from dsv3_megatron.metrics.flops import RunSpeed, flops_per_token

    run = slice_run(options, "bf16", num_experts)
    model, training = run.model, run.training
    speed = RunSpeed(training.seq_length, flops_per_token(model, training.seq_length))
    config = config_text(options, run)
    rows = []
    for name, result in results.items():
        rates = speed.rates(training.global_batch_size, result.median)
        base = results.get(name.replace("fp8", "bf16"))
        ratio = base.median / result.median if base and result.backend else None
        print(f"{name:8} {result.backend:20} {result.median:8.3f} s ({min(result.seconds):.3f}-"
              f"{max(result.seconds):.3f}, {len(result.seconds)} steps)  {rates.tokens_per_second:9.0f} tok/s  "
              f"{rates.tflops_per_device:7.1f} model TFLOP/s  {result.peak_bytes / 1e9:6.1f} GB  loss {result.loss:.4f}"
              + (f"  {ratio:.2f}x its BF16 step" if ratio else ""))
        numbers = [("step_time_median", result.median, "s"), ("step_time_min", min(result.seconds), "s"),
                   ("step_time_max", max(result.seconds), "s"), ("throughput", rates.tokens_per_second, "token/s"),
                   ("model_flops", rates.tflops_per_device, "TFLOP/s"), ("peak_memory", result.peak_bytes / 1e9, "GB")]
        if options.device == "cuda":
            numbers += [(what, value, "1") for what, value in compare_memory(options, name, num_experts, result)]
        if ratio:
            numbers.append(("speed against bf16", ratio, "1"))
            if not options.smoke:
                print(f"         target {TARGET_SPEEDUP}x: {'met' if ratio >= TARGET_SPEEDUP else 'missed'}")
        rows += [Measurement(f"{name} {result.backend}".strip(), config, *number) for number in numbers]
    return rows


def parser() -> argparse.ArgumentParser:
    """Options of this benchmark."""
    made = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu goes with --smoke alone")
    made.add_argument("--smoke", action="store_true", help="narrow widths: shows that it runs")
    made.add_argument("--layers", type=int, default=3, help="of which one is dense")
    made.add_argument("--experts", type=int, help="a layer; without it as many as fit")
    made.add_argument("--vocab-size", type=int, default=16384)
    made.add_argument("--seq-length", type=int, default=4096)
    made.add_argument("--micro-batch-size", type=int, default=2)
    made.add_argument("--num-microbatches", type=int, default=2)
    made.add_argument("--steps", type=int, default=10, help="timed steps of each contender")
    made.add_argument("--warm-up", type=int, default=3, help="steps before them")
    made.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), help="all that can run here")
    made.add_argument("--no-csv", action="store_true", help="print only")
    made.add_argument("--serve", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    return made


def main(arguments: list[str] | None = None) -> int:
    """Measure each contender, print the table; exit code 1 if one failed, 2 where it cannot run."""
    given = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(given)
    if options.serve:
        result = measure_here(options, options.serve, options.experts)
        print("\n" + json.dumps(result.__dict__))
        return 0
    import torch

    if options.device == "cpu" and not options.smoke:
        print("--device cpu runs narrow widths only; add --smoke", file=sys.stderr)
        return 2
    if options.device == "cuda" and not torch.cuda.is_available():
        print("bench_fp8_slice needs CUDA: one Hopper GPU; --device cpu --smoke shows that it runs", file=sys.stderr)
        return 2
    has_engine = options.device == "cuda" and is_installed("transformer_engine")
    names = options.contenders or [name for name in CONTENDERS if has_engine or not name.startswith("te-")]
    if options.smoke:
        num_experts = SMOKE["num_experts"]
    else:
        num_experts = options.experts or experts_that_fit(
            options, torch.cuda.get_device_properties(0).total_memory)
    results: dict[str, Result] = {}
    for name in names:
        measured = measure_alone(given, name, num_experts)
        if measured:
            results[name] = measured
            # At once: a session with little time may end this at any moment.
            print(f"{name}: {measured.median:.3f} s a step, {measured.peak_bytes / 1e9:.2f} GB, loss "
                  f"{measured.loss:.4f}", flush=True)
    rows = report(options, results, num_experts)
    if rows and not options.no_csv:
        print(f"written: {append_rows('fp8_slice.csv', rows, next(iter(results.values())).device)}")
    return int(len(results) < len(names))


if __name__ == "__main__":
    sys.exit(main())
