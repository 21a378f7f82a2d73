"""Decoding tokens/s of this library against `transformers.DeepseekV3ForCausalLM.generate` with its cache.

Both continue the same random prompts greedily with random weights of `laptop`'s shape, which no draft would guess, so
there is no speculative contender here: its gain depends on the trained model, and `dsv3 generate` prints it. Timed
are the tokens after each prompt's first, without the prefill. Contenders are processes of their own and alternate.
`--cache-table` prints, for every preset, what a position takes in each cache, as the caches are allocated, and appends
it to the results.

Usage:
    python -m tools.bench.bench_generate --batch-sizes 1 8 --prompt-lengths 64 416 --steps 5 --threads 2
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
from tools.bench.contenders import Contender, Step, add_arguments, run_benchmark, serve  # noqa: E402
from tools.bench.records import Measurement, append_rows  # noqa: E402

OURS = {"dsv3_megatron": "latent", "dsv3_megatron-full-cache": "full"}
PEER = "transformers"
RESULTS = "generate.csv"


@dataclass(frozen=True)
class Setting:
    """What one process measures: `num_new` tokens after prompts of `prompt_length`."""

    contender: str
    precision: str
    batch_size: int
    prompt_length: int
    num_new: int
    threads: int

    def __str__(self) -> str:
        return (f"laptop {self.precision} decode batch={self.batch_size} prompt={self.prompt_length} "
                f"new={self.num_new} threads={self.threads}")


def random_prompts(setting: Setting, vocab_size: int) -> Any:
    """The same ids [B, S] for every contender."""
    import torch

    return torch.randint(3, vocab_size, (setting.batch_size, setting.prompt_length),
                         generator=torch.Generator().manual_seed(0))


def ours_step(setting: Setting) -> Step:
    """This library's generator, as `dsv3 generate` runs it, on random weights."""
    from dsv3_megatron.config.presets import laptop
    from dsv3_megatron.generation.forward import CachedModel
    from dsv3_megatron.generation.generator import Generator, Options
    from dsv3_megatron.runs.built_model import build_model
    from dsv3_megatron.runs.rank import prepare_rank

    prepare_rank()
    run = laptop().override(precision=setting.precision, transformer_impl="local", mtp_num_layers=0)
    model = CachedModel(build_model(run).stages[0].eval())
    prompts = random_prompts(setting, run.model.vocab_size).tolist()
    options = Options(setting.num_new, run.model.max_position_embeddings, kv_cache=OURS[setting.contender],
                      batch_size=setting.batch_size)

    def step() -> dict[str, float]:
        generator = Generator(model, options)
        events = generator.generate(prompts)
        for _first in range(setting.batch_size):
            next(events)
        started = time.process_time()
        for _event in events:
            pass
        return {"seconds": generator.statistics.decode_s, "cpu_seconds": time.process_time() - started}

    return step


def peer_step(setting: Setting) -> Step:
    """Transformers' `generate`, greedy, with the cache it chooses."""
    import torch
    from transformers import DeepseekV3ForCausalLM

    from tools.bench.peer import transformers_config
    from tools.bench.shapes import LAPTOP

    torch.manual_seed(0)
    config = transformers_config(LAPTOP, use_cache=True, eos_token_id=None, bos_token_id=None, pad_token_id=0)
    dtype = torch.bfloat16 if setting.precision == "bf16" else torch.float32
    model = DeepseekV3ForCausalLM(config).to(dtype).eval()
    prompts_BS = random_prompts(setting, LAPTOP.vocab_size)

    class TokenTimes:
        """Called by `generate` with the prompts, then with each position's tokens."""

        def __init__(self) -> None:
            self.times: list[tuple[float, float]] = []

        def put(self, _ids: torch.Tensor) -> None:
            self.times.append((time.perf_counter(), time.process_time()))

        def end(self) -> None:
            pass

    def step() -> dict[str, float]:
        clock = TokenTimes()
        with torch.inference_mode():
            model.generate(prompts_BS, attention_mask=torch.ones_like(prompts_BS), max_new_tokens=setting.num_new,
                           do_sample=False, use_cache=True, streamer=clock)
        assert len(clock.times) == 1 + setting.num_new
        seconds, cpu_seconds = (last - first for first, last in zip(clock.times[1], clock.times[-1], strict=True))
        return {"seconds": seconds, "cpu_seconds": cpu_seconds}

    return step


def report(contenders: list[Contender[Setting]]) -> list[Measurement]:
    """Print a table; return its numbers."""
    rows = []
    median = {c.setting.contender: statistics.median(c.seconds) for c in contenders if c.seconds}
    median_cpu = {c.setting.contender: statistics.median(c.cpu_seconds) for c in contenders if c.seconds}
    for c in contenders:
        name, config = c.setting.contender, str(c.setting)
        if not c.seconds:
            print(f"{name:26} {config} no step: {c.error}")
            continue
        num_tokens = c.setting.batch_size * (c.setting.num_new - 1)
        ratio, cpu_ratio = (times[PEER] / times[name] if PEER in times else float("nan")
                            for times in (median, median_cpu))
        cpu_ms = median_cpu[name] / (c.setting.num_new - 1) * 1e3
        print(f"{name:26} {config} {num_tokens / median[name]:8.1f} tok/s  "
              f"({num_tokens / max(c.seconds):.1f}-{num_tokens / min(c.seconds):.1f}, {len(c.seconds)} steps)  "
              f"{ratio:.2f}x {PEER}; "
              f"{cpu_ms:.1f} CPU-ms a position, {cpu_ratio:.2f}x")
        rows += [Measurement(name, config, metric, value, unit) for metric, value, unit in (
            ("throughput", num_tokens / median[name], "token/s"),
            ("throughput_min", num_tokens / max(c.seconds), "token/s"),
            ("throughput_max", num_tokens / min(c.seconds), "token/s"),
            ("cpu_time_per_position", cpu_ms, "ms"),
            ("num_steps", len(c.seconds), "1"))]
    return rows


def cache_table() -> list[Measurement]:
    """Bytes of a position in each cache of every preset, as allocated (on torch's meta device)."""
    from dsv3_megatron.config.presets import PRESETS
    from dsv3_megatron.platform import prepare

    prepare()
    import torch

    from dsv3_megatron.generation.cache import KV_CACHES, make_cache
    from dsv3_megatron.model.mcore_config import mcore_config

    rows = []
    for name, make in PRESETS.items():
        config = mcore_config(make(), "bf16")
        found = {kind: make_cache(kind, config, num_layers=config.num_layers, num_rows=1, capacity=4096,
                                  dtype=torch.bfloat16, device=torch.device("meta")).bytes_per_token
                 for kind in KV_CACHES}
        print(f"{name:12} latent {found['latent']:10,} B/token  full {found['full']:10,} B/token  "
              f"{found['full'] / found['latent']:.1f}x")
        rows += [Measurement(kind, f"{name} bf16 cache", "cache_bytes_per_token", size, "B")
                 for kind, size in found.items()]
    return rows


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Decoding tokens/s of this library against Transformers.")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--contenders", nargs="+", default=[*OURS, PEER], choices=(*OURS, PEER))
    parser.add_argument("--prompt-lengths", type=int, nargs="+", default=[64, 416])
    parser.add_argument("--new-tokens", type=int, default=65, help="of each prompt; all but the first are timed")
    add_arguments(parser, steps=5, warm_up=1, budget_s=120.0, limit_s=300.0)
    parser.add_argument("--cache-table", action="store_true", help="sizes of caches instead of speed")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; exit code 1 if a contender failed."""
    options = _parse(arguments)
    if options.serve:
        setting = Setting(**json.loads(options.serve))
        serve(lambda: ours_step(setting) if setting.contender in OURS else peer_step(setting))
        return 0
    if options.cache_table:
        rows = cache_table()
        if not options.no_csv:
            append_rows("generate_cache.csv", rows, "any (computed)")
        return 0
    groups = ([Setting(name, options.precision, batch_size, prompt_length, options.new_tokens, options.threads)
               for name in options.contenders]
              for batch_size, prompt_length in itertools.product(options.batch_sizes, options.prompt_lengths))
    return run_benchmark(__file__, groups, report, RESULTS, options)


if __name__ == "__main__":
    sys.exit(main())
