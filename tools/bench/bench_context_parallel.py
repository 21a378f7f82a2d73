"""What context parallelism does to a rank of a GPU run: its peak memory, and what ranks pass each other; as rehearsed.

One dense and one MoE layer at DeepSeek-V3's widths, EP64, a sequence of 8K, 16K or 32K tokens over 1, 2 or 4 ranks.
The code of a CUDA rank runs on tensors without data (`dsv3 rehearse`): bytes are exact counts of its tensors, messages
those that it posts. Times are not seen. Beside the elements of a token and layer that are received forward stand those
of keys and values, computed from the widths: of 16 heads, a rank's under TP8, and of all 128.

Usage:
    python -m tools.bench.bench_context_parallel
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
from tools.bench.records import Measurement, append_rows  # noqa: E402

HEADS, QUERY, VALUE = 128, 192, 128
_LAYERS = 2
_MODEL = (
    "--preset tiny --num-layers 2 --num-dense-layers 1 --mtp-num-layers 0 --hidden-size 7168 --num-attention-heads 128 "
    "--q-lora-rank 1536 --kv-lora-rank 512 --qk-nope-head-dim 128 --qk-rope-head-dim 64 --v-head-dim 128 "
    "--ffn-hidden-size 18432 --moe-ffn-hidden-size 2048 --num-experts 64 --expert-model-parallel-size 64 "
    "--moe-router-topk 8 --moe-router-num-groups 8 --moe-router-group-topk 4 --precision bf16 --micro-batch-size 1 "
    "--global-batch-size 64 --max-position-embeddings 32768").split()


def rehearsed(length: int, ranks: int) -> dict[str, Any]:
    """Rank 0 of a run whose sequences are split over so many ranks."""
    done = subprocess.run(
        [sys.executable, "-m", "dsv3_megatron", "rehearse", *_MODEL, "--seq-length", str(length),
         "--context-parallel-size", str(ranks), "--world-size", "64", "--processes", "1", "--num-microbatches", "1",
         "--json"], capture_output=True, text=True, cwd=REPOSITORY)
    if done.returncode not in (0, 1):
        raise RuntimeError(done.stderr)
    (rank,) = json.loads(done.stdout)["ranks"]
    if rank["failure"] is not None:
        raise RuntimeError(rank["failure"])
    return dict(rank)


def passed_elements(rank: dict[str, Any], length: int, ranks: int) -> dict[str, float]:
    """Elements of a token and layer that go from rank to rank each time, by dtype: latents, and their gradients."""
    return {row["dtype"]: row["mean_bytes"] / {"bfloat16": 2, "float32": 4}[row["dtype"]] / (length / ranks)
            for row in rank["messages"] if row["phase"] == "step" and row["operation"] == "all_to_all"
            and f"group of {ranks} ranks" in row["group"]}


def report(lengths: list[int]) -> list[Measurement]:
    """Print a table; return its numbers."""
    rows = []
    for length in lengths:
        for ranks in (1, 2, 4):
            rank, config = rehearsed(length, ranks), f"{_LAYERS} layers of V3's widths, S={length} CP{ranks}"
            passes = sum(part["bytes"] for part in rank["components"] if part["name"] == "passes")
            values = {"peak": (rank["peak_bytes"], "B"), "peak_of_passes": (passes, "B")}
            elements = passed_elements(rank, length, ranks) if ranks > 1 else {}
            values |= {f"passed_elements_{dtype}": (count, "1") for dtype, count in elements.items()}
            rows += [Measurement("context_parallel", config, metric, value, unit)
                     for metric, (value, unit) in values.items()]
            print(f"{config}: peak {rank['peak_bytes'] / 1e9:.2f} GB, of passes {passes / 1e9:.2f} GB; elements of a "
                  f"token and layer {elements or 'none'}", flush=True)
    for heads in (16, HEADS):
        rows.append(Measurement("context_parallel", f"keys and values of {heads} heads, computed", "elements",
                                heads * (QUERY + VALUE), "1"))
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Run the rehearsals."""
    parser = argparse.ArgumentParser(description="Memory and messages of context parallelism, as rehearsed.")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384, 32768])
    parser.add_argument("--no-csv", action="store_true", help="print only")
    options = parser.parse_args(arguments)
    rows = report(options.lengths)
    if not options.no_csv:
        path = append_rows("context_parallel.csv", rows, "rehearsed")
        print(f"appended to {path.relative_to(REPOSITORY)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
