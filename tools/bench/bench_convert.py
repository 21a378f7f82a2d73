"""Conversion of a checkpoint with DeepSeek-V3's tensor shapes, both ways, against a plain copy of the same files.

A synthetic checkpoint is written: V3's widths with `--layers` layers of which one is dense, `--experts` experts in each
of the others, no MTP module, random values. Then, in BF16 and in FP8, each step a process of its own with its own peak
memory: a plain copy of the source's files, hf-to-megatron, a plain copy of our files, megatron-to-hf, and the audit.
A plain copy is `shutil.copyfile` of each file in as many threads, flushed to disk, as the conversion's files are.
Copies and conversions alternate, `--repeats` times; medians are recorded (the first writes to fresh blocks of a
virtual disk are slow). With `--drop-caches` (as root, on a machine of one's own) every step reads from disk; without
it what fits is read from memory.

The result of the way back is compared with the source byte for byte.

Usage:
    python -m tools.bench.bench_convert --folder /tmp/bench-convert --layers 4 --experts 24 --workers 2
"""

from __future__ import annotations

import argparse
import dataclasses
import filecmp
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
from tools.bench.records import Measurement, append_rows, load_average  # noqa: E402

NAME = "convert"


def model_of(layers: int, experts: int) -> Any:
    """V3's widths with fewer layers and experts; groups of two experts, so that the routing rules hold."""
    from tools.bench.shapes import V3

    return dataclasses.replace(V3, num_layers=layers, num_dense_layers=1, num_experts=experts, moe_router_topk=8,
                               moe_router_num_groups=4, moe_router_group_topk=4, mtp_num_layers=0)


def make_source(folder: Path, layers: int, experts: int, dtype: str) -> None:
    """A checkpoint of random values, written with the library's own plan and nothing else of it."""
    import torch

    from dsv3_megatron.checkpoint.hf.config_json import model_config_to_json
    from dsv3_megatron.checkpoint.hf.weight_files import index_json, plan_shards

    model = model_of(layers, experts)
    shards = plan_shards(model, dtype, 1_000_000_000)
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for shard in shards:
        with open(folder / shard.file, "wb") as stream:
            stream.write(shard.header)
            for entry in shard.entries:
                if entry.name.endswith("_scale_inv"):
                    value = torch.rand(entry.shape, generator=generator) * 1e-3 + 1e-5
                elif entry.dtype == torch.float8_e4m3fn:
                    raw = torch.randint(0, 256, entry.shape, generator=generator, dtype=torch.uint8)
                    value = raw.masked_fill_((raw & 0x7F) == 0x7F, 0)
                else:
                    # Random bits of a moderate size: the sign, a fixed exponent, random fractions.
                    raw = torch.randint(-128, 128, entry.shape, generator=generator, dtype=torch.int8)
                    value = (raw.to(entry.dtype) / 64).to(entry.dtype)
                stream.write(memoryview(value.contiguous().view(-1).view(torch.uint8).numpy()))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_json(shards)))
    config = model_config_to_json(model, dtype="bfloat16", is_fp8=dtype == "fp8")
    (folder / "config.json").write_text(json.dumps(config))


def copy_plainly(source: Path, output: Path, workers: int) -> None:
    """Every file of a folder, in parallel, flushed to disk."""
    def copy(file: Path) -> None:
        target = output / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
        descriptor = os.open(target, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(copy, [file for file in source.rglob("*") if file.is_file()]))


def run_step(step: str, source: str, output: str, workers: int) -> dict[str, float]:
    """One timed step in this process; seconds, and peak memory above what the imports took."""
    from dsv3_megatron.platform import prepare

    prepare()
    from dsv3_megatron.checkpoint.hf import HuggingFaceDirectory
    from dsv3_megatron.checkpoint.hf.audit import audit
    from dsv3_megatron.checkpoint.hf.stored import MegatronWeights
    from dsv3_megatron.checkpoint.hf.to_hugging_face import convert_to_hugging_face
    from dsv3_megatron.checkpoint.hf.to_megatron import convert_to_megatron

    steps: dict[str, Callable[[], Any]] = {
        "copy": lambda: copy_plainly(Path(source), Path(output), workers),
        "hf-to-megatron": lambda: convert_to_megatron(source, output, num_workers=workers),
        "megatron-to-hf": lambda: convert_to_hugging_face(source, output, num_workers=workers),
        "verify": lambda: print(audit(HuggingFaceDirectory(source), MegatronWeights(output), num_workers=workers),
                                file=sys.stderr),
    }
    before = memory_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    started = time.perf_counter()
    steps[step]()
    seconds = time.perf_counter() - started
    peak = memory_bytes("VmHWM")
    return {"seconds": seconds, "peak_bytes": peak - before, "process_peak_bytes": peak}


def memory_bytes(what: str) -> float:
    """VmRSS or VmHWM of this process: resident memory now, and at most. (getrusage counts the parent's in.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(what + ":"))


def measure(step: str, source: Path, output: Path, options: argparse.Namespace) -> dict[str, float]:
    """Run one step in a process of its own, with an empty folder to write to."""
    if step != "verify" and output.exists():
        shutil.rmtree(output)
    os.sync()
    if options.drop_caches:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    done = subprocess.run(
        [sys.executable, __file__, "--step", json.dumps([step, str(source), str(output), options.workers])],
        stdout=subprocess.PIPE, text=True, check=True, cwd=REPOSITORY)
    report = json.loads(done.stdout.splitlines()[-1])
    print(f"  {step:<16}{report['seconds']:8.1f} s, peak {report['peak_bytes'] / 1e9:.2f} GB above the imports, "
          f"load {load_average():.1f}", flush=True)
    return report


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def largest_tensor(folder: Path) -> int:
    """Bytes of the largest tensor of a Hugging Face folder, as BF16 where it is FP8."""
    from dsv3_megatron.checkpoint.hf import HuggingFaceDirectory

    directory = HuggingFaceDirectory(folder)
    return max(2 * tensor.num_elements for tensor in directory.tensors.values())


def bench(options: argparse.Namespace, dtype: str) -> Iterator[Measurement]:
    """All steps for one dtype."""
    root = Path(options.folder)
    source, ours, back, copied = root / "source", root / "ours", root / "back", root / "copied"
    make_source(source, options.layers, options.experts, dtype)
    config = (f"V3 widths {dtype} layers={options.layers} experts={options.experts} "
              f"{folder_bytes(source) / 1e9:.2f}GB workers={options.workers}")
    largest = largest_tensor(source)
    print(f"{config}, largest tensor {largest / 1e9:.2f} GB as BF16", flush=True)
    for step, begin, end in (("hf-to-megatron", source, ours), ("megatron-to-hf", ours, back)):
        rounds = [(measure("copy", begin, copied, options), measure(step, begin, end, options))
                  for _ in range(options.repeats)]
        shutil.rmtree(copied)
        copying = statistics.median(copy["seconds"] for copy, _ in rounds)
        seconds = statistics.median(report["seconds"] for _, report in rounds)
        peak = max(report["peak_bytes"] for _, report in rounds)
        num_read, num_written = folder_bytes(begin), folder_bytes(end)
        yield Measurement(f"copy before {step}", config, "seconds", copying, "s")
        yield Measurement(f"copy before {step}", config, "throughput", num_read / 1e6 / copying, "MB/s")
        yield Measurement(step, config, "seconds", seconds, "s")
        yield Measurement(step, config, "throughput", num_read / 1e6 / seconds, "MB/s read")
        yield Measurement(step, config, "throughput_written", num_written / 1e6 / seconds, "MB/s written")
        yield Measurement(step, config, "relative_to_copy", copying / seconds, "x a plain copy's speed")
        yield Measurement(step, config, "peak_memory", peak / 1e9, "GB above imports")
        yield Measurement(step, config, "peak_memory_relative", peak / largest, "x largest tensor")
        yield Measurement(step, config, "process_peak_memory",
                          max(report["process_peak_bytes"] for _, report in rounds) / 1e9, "GB in all")
        yield Measurement(step, config, "repeats", options.repeats, "")
    names = sorted(file.name for file in source.iterdir())
    if filecmp.cmpfiles(source, back, names, shallow=False) != (names, [], []):
        raise SystemExit("the way back did not give the source's files")
    report = measure("verify", source, ours, options)
    yield Measurement("verify", config, "seconds", report["seconds"], "s")
    yield Measurement("verify", config, "peak_memory", report["peak_bytes"] / 1e9, "GB above imports")
    for folder in (source, ours, back):
        shutil.rmtree(folder)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; append its rows to results/convert.csv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="where the checkpoints go, about four times --layers' size; must not exist")
    parser.add_argument("--layers", type=int, default=4, help="one of them dense (%(default)s)")
    parser.add_argument("--experts", type=int, default=16, help="in each MoE layer, a multiple of 8 (%(default)s)")
    parser.add_argument("--dtypes", nargs="+", choices=("bf16", "fp8"), default=("bf16", "fp8"))
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="threads (%(default)s)")
    parser.add_argument("--repeats", type=int, default=1, help="copies and conversions each (%(default)s)")
    parser.add_argument("--drop-caches", action="store_true", help="forget cached pages before each step (root)")
    parser.add_argument("--dry-run", action="store_true", help="record nothing")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.step:
        print(json.dumps(run_step(*json.loads(options.step))))
        return 0
    if not options.folder or Path(options.folder).exists():
        parser.error(f"--folder {options.folder} must be given and not exist")
    from dsv3_megatron.platform import detect_device

    cache = "cold" if options.drop_caches else "warm"
    device = f"{detect_device().name}, {cache} page cache, load {load_average():.1f}"
    rows: list[Measurement] = []
    try:
        for dtype in options.dtypes:
            rows += bench(options, dtype)
    finally:
        shutil.rmtree(options.folder, ignore_errors=True)
    if not options.dry_run:
        print(append_rows(f"{NAME}.csv", rows, device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
