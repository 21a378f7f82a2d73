"""The optimizer's update of a shard on one GPU: one launch a parameter group, block by block, and torch's fp32 AdamW.

The weights are those of a share of DeepSeek-V3's routed experts and a number of norms, sharded as Megatron-Core shards
them. One step of the first two is compared first: the same fp32 results up to their last bits, the same rounding. Rows
go to results/adamw.csv. On a GPU: not run, not measured.

Usage:
    python -m tools.bench.bench_adamw
    python -m tools.bench.bench_adamw --smoke --no-csv        on a CPU, under Triton's interpreter: no timing of use
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from tools.bench.records import Measurement, append_rows

WARM_UP, REPEATS = 3, 10
# Bytes that an element moves: weight and gradient read, weight written, both moments read and written.
_NARROW = 3 * 4 + 4 * 2
BYTES = {"one launch": _NARROW, "block by block": _NARROW, "torch fused, fp32 moments": 3 * 4 + 4 * 4}


def weights_of(sizes: list[int], device: Any) -> list[Any]:
    """Weights with gradients, the same whenever they are made."""
    import torch

    stream = torch.Generator(device=device).manual_seed(0)
    weights = []
    for size in sizes:
        weight = torch.nn.Parameter(torch.randn(size, generator=stream, device=device) * 0.02)
        weight.grad = torch.randn(size, generator=stream, device=device) * 1e-4
        weights.append(weight)
    return weights


def optimizer_of(weights: list[Any], *, is_fused: bool) -> Any:
    """This library's AdamW with bf16 moments, rounded stochastically."""
    import torch

    from dsv3_megatron.optim.adamw import NarrowMomentAdamW
    from dsv3_megatron.optim.shards import Named, ParameterShard

    shards = [ParameterShard(weight, weight, 0, weight.numel(), None, (Named(f"w{index}", 0, weight.numel(), 0),))
              for index, weight in enumerate(weights)]
    groups = torch.optim.AdamW(weights, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1).param_groups
    return NarrowMomentAdamW(groups, shards, exp_avg_dtype=torch.bfloat16, exp_avg_sq_dtype=torch.bfloat16,
                             is_stochastic=True, seed=1, is_fused=is_fused)


def check(sizes: list[int], device: Any) -> None:
    """Compare two steps of the kernel with two block by block.

    Raises:
        SystemExit: They differ by more than the last bits of fp32 can make.
    """
    import torch

    made = []
    for is_fused in (True, False):
        weights = weights_of(sizes, device)
        optimizer = optimizer_of(weights, is_fused=is_fused)
        optimizer.step()
        optimizer.step()
        made.append((weights, optimizer))
    (ours, ours_optimizer), (theirs, theirs_optimizer) = made
    for mine, other in zip(ours, theirs, strict=True):
        error = (mine - other).abs().max().item()
        moments = [ours_optimizer.state[mine][name] != theirs_optimizer.state[other][name]
                   for name in ("exp_avg", "exp_avg_sq")]
        share = torch.stack(moments).float().mean().item()
        # A moment that took the other neighbour moves the second update by 2^-8 of it.
        if error > 1e-6 or share > 5e-3:
            raise SystemExit(f"one launch differs from block by block: weights by {error:.3g}, {share:.3g} of moments; "
                             "no timing is of use")
    print(f"one launch and block by block: equal to rounding, {len(sizes)} weights of {sum(sizes)} elements")


def milliseconds(function: Callable[[], Any], is_cuda: bool) -> float:
    """Median time of a call, the device's work included."""
    import torch

    times = []
    for repeat in range(WARM_UP + REPEATS if is_cuda else 1):
        started = time.perf_counter()
        function()
        if is_cuda:
            torch.cuda.synchronize()
        if repeat >= WARM_UP or not is_cuda:
            times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


def main(arguments: list[str] | None = None) -> int:
    """Check, then time each way."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--experts", type=int, default=4, help="V3's experts that the shard holds (%(default)s)")
    parser.add_argument("--smoke", action="store_true", help="small sizes, on a CPU")
    parser.add_argument("--no-csv", action="store_true", help="print only")
    options = parser.parse_args(arguments)
    if options.smoke:
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    from dsv3_megatron.platform import prepare

    device = prepare()
    if not options.smoke and not device.is_cuda:
        print("bench_adamw needs one CUDA device; --smoke shows that it runs", file=sys.stderr)
        return 2
    sizes = [3000, 128] if options.smoke else [2048 * 7168] * (3 * options.experts) + [7168] * 20
    check(sizes[-22:], device.torch_device)
    rows, elements = [], sum(sizes)
    for name in BYTES:
        weights = weights_of(sizes, device.torch_device)
        optimizer = (torch.optim.AdamW(weights, lr=1e-4, fused=True) if name.startswith("torch")
                     else optimizer_of(weights, is_fused=name == "one launch"))
        taken = milliseconds(optimizer.step, device.is_cuda)
        speed = BYTES[name] * elements / taken * 1e-6
        print(f"{name}: {taken:.3f} ms, {speed:.0f} GB/s", flush=True)
        config = f"weights={len(sizes)} elements={elements}"
        rows += [Measurement(f"adamw {name}", config, "time", taken, "ms"),
                 Measurement(f"adamw {name}", config, "bandwidth", speed, "GB/s")]
    if not options.no_csv:
        print(f"written: {append_rows('adamw.csv', rows, device.name)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
