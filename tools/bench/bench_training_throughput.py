"""Training tokens/s of this library against `transformers.DeepseekV3ForCausalLM` of the same shape.

A step is forward, backward and AdamW on random tokens, without MTP (Transformers has none). Ours is the trainer's own
step: fp32 main gradients and master weights, gradient clipping, load statistics and router-bias update included. The
peer is a plain loop around the model in the given dtype with fused AdamW and no clipping, in Transformers' default
settings and, as further contenders, with its other expert implementations. Each contender is a process of its own;
steps alternate between them, so that a disturbance of the machine meets all; the others sleep meanwhile.

One contender more is "products": the matrix products of a step alone, with the shapes of a balanced step, as a rate.
It is what the machine would allow at the time, in memory that is kept as ours is, and each contender's share of it is
printed and recorded.

With `--processes 4` a step's sequences are divided over four processes, each with `--threads` threads: data-parallel
ours, and Transformers in torch's DistributedDataParallel. A further contender is ours with two pipeline stages and the
experts of each divided over two ranks. "products" are then four processes at once with the products of a quarter of
the tokens each.

A contender that has used `--budget-s` takes no more steps: where a CPU multiplies bf16 natively at 1 GFLOP/s one step
of the peer takes minutes. A step above `--step-limit-s` is given up and reported as such. How many steps a number
rests on is in the results.

Usage:
    python -m tools.bench.bench_training_throughput --precisions fp32 bf16 --steps 5 --threads 2
    python -m tools.bench.bench_training_throughput --processes 4 --threads 1
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
from tools.bench.contenders import Contender, Step, add_arguments, run_benchmark, serve  # noqa: E402
from tools.bench.records import Measurement  # noqa: E402

OURS, PRODUCTS = "dsv3_megatron", "products"
# Ours, as another four processes share the work.
PIPED, NUM_PIPED = "dsv3_megatron-pp2-ep2", 4
PEERS = {
    "transformers": {},
    "transformers-experts-eager": {"_experts_implementation": "eager"},
    "transformers-experts-batched": {"_experts_implementation": "batched_mm"},
}


@dataclass(frozen=True)
class Setting:
    """What one process measures."""

    contender: str
    precision: str
    seq_length: int
    batch_size: int
    threads: int
    processes: int = 1

    @property
    def own_sequences(self) -> int:
        """Sequences of a step that a process computes, where each computes whole ones."""
        return self.batch_size // self.processes


def ours_step(setting: Setting) -> Step:
    """This library's training step on random tokens, as the trainer takes it."""
    from dsv3_megatron.config.presets import laptop
    from tools.bench.random_run import random_token_trainer

    run = laptop().override(
        mtp_num_layers=0,
        seq_length=setting.seq_length,
        micro_batch_size=setting.own_sequences,
        global_batch_size=setting.batch_size,
        precision=setting.precision,
        eval_interval=0,
    )
    if setting.contender == PIPED:
        run = run.override(pipeline_model_parallel_size=2, expert_model_parallel_size=2)
    trainer = random_token_trainer(run)
    return lambda: {"loss": trainer.train_step()[0].lm_loss or 0.0}


def peer_step(setting: Setting) -> Step:
    """A plain training step of Transformers' model."""
    import torch
    from transformers import DeepseekV3ForCausalLM

    from tools.bench.peer import transformers_config
    from tools.bench.shapes import LAPTOP

    config = transformers_config(
        LAPTOP, max_position_embeddings=setting.seq_length, use_cache=False, eos_token_id=None, bos_token_id=None)
    for name, value in PEERS[setting.contender].items():
        setattr(config, name, value)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if setting.precision == "bf16" else torch.float32
    model = DeepseekV3ForCausalLM(config).to(dtype).train()
    if setting.processes > 1:
        torch.distributed.init_process_group("gloo")
        model = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    generator = torch.Generator().manual_seed(int(os.environ.get("RANK", "0")))

    def step() -> dict[str, float]:
        tokens = torch.randint(0, LAPTOP.vocab_size, (setting.own_sequences, setting.seq_length), generator=generator)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": float(loss.detach())}

    return step


@dataclass(frozen=True)
class Product:
    """A weight of the model and the rows it meets, so many times in a step."""

    rows: int
    num_outputs: int
    num_inputs: int
    times: int

    @property
    def flops(self) -> int:
        """FLOPs of forward and both gradients in a step."""
        return 6 * self.rows * self.num_outputs * self.num_inputs * self.times


def step_products(num_tokens: int) -> list[Product]:
    """Every product of a step of `laptop` without MTP but those of core attention and the router, experts balanced."""
    from tools.bench.shapes import LAPTOP, product_shapes

    layers, dense, moe = LAPTOP.num_layers, LAPTOP.num_dense_layers, LAPTOP.num_moe_layers
    found = []
    for shape in product_shapes(LAPTOP):
        times = {"head": 1, "dense_gate_up": dense, "dense_down": dense}.get(shape.name, layers)
        if shape.name.startswith("expert"):
            rows = num_tokens * LAPTOP.moe_router_topk // LAPTOP.num_experts
            found.append(Product(rows, shape.num_outputs, shape.num_inputs, LAPTOP.num_experts * moe))
            times = LAPTOP.num_shared_experts * moe
        found.append(Product(num_tokens, shape.num_outputs, shape.num_inputs, times))
    return found


def products_step(setting: Setting) -> Step:
    """The products of a step, in the dtype in which this library multiplies; operands of a shape are the same ones."""
    import torch

    from dsv3_megatron.ops.backend import choose_product_backend
    from dsv3_megatron.ops.host_memory import keep_freed_memory

    # As ours has it: fresh pages for every result would be no limit of the machine's.
    keep_freed_memory()
    stored = torch.bfloat16 if setting.precision == "bf16" else torch.float32
    is_wide = choose_product_backend("auto", torch.device("cpu"), stored) == "via_fp32"
    dtype = torch.float32 if is_wide else stored

    def operands(product: Product) -> list[torch.Tensor]:
        rows, outputs, inputs = product.rows, product.num_outputs, product.num_inputs
        return [torch.randn(*shape).to(dtype) for shape in ((rows, inputs), (outputs, inputs), (rows, outputs))]

    prepared = [(product.times, operands(product)) for product in step_products(
        setting.seq_length * setting.own_sequences)]

    def step() -> dict[str, float]:
        for times, (x, weight, grad_y) in prepared:
            for _ in range(times):
                torch.mm(x, weight.t())
                torch.mm(grad_y, weight)
                torch.mm(grad_y.t(), x)
        return {}

    return step


def products_rate(contenders: list[Contender[Setting]]) -> float | None:
    """FLOP/s of the products alone, if they were measured."""
    for c in contenders:
        if c.setting.contender == PRODUCTS and c.seconds:
            of_process = step_products(c.setting.seq_length * c.setting.own_sequences)
            return c.setting.processes * sum(product.flops for product in of_process) / statistics.median(c.seconds)
    return None


def flops_of_token(seq_length: int) -> int:
    """Model FLOPs of a token of `laptop` without MTP, forward and backward."""
    from dsv3_megatron.metrics.flops import flops_per_token
    from tools.bench.shapes import LAPTOP

    return flops_per_token(LAPTOP, seq_length).main


def report(contenders: list[Contender[Setting]]) -> list[Measurement]:
    """Print a table; return its numbers."""
    rows = []
    tokens_per_step = contenders[0].setting.seq_length * contenders[0].setting.batch_size
    median = {c.setting.contender: statistics.median(c.seconds) for c in contenders if c.seconds}
    rate = products_rate(contenders)
    for c in contenders:
        name, config = c.setting.contender, _describe(c.setting)
        if not c.seconds:
            print(f"{name:30} {config:40} no step: {c.error}")
            continue
        if name == PRODUCTS:
            assert rate is not None, "it has steps"
            print(f"{name:30} {config:40} {rate / 1e9:8.1f} GFLOP/s  {median[name]:6.2f} s ({len(c.seconds)} steps)")
            rows.append(Measurement(name, config, "rate", rate / 1e9, "GFLOP/s"))
            rows.append(Measurement(name, config, "num_steps", len(c.seconds), "1"))
            continue
        speed = tokens_per_step / median[name]
        slowest, fastest = max(c.seconds), min(c.seconds)
        cpu = statistics.median(c.cpu_seconds)
        ratio = median[name] / median[OURS] if OURS in median else float("nan")
        print(
            f"{name:30} {config:40} {speed:8.1f} tok/s  {median[name]:8.2f} s ({fastest:.2f}-{slowest:.2f}, "
            f"{len(c.seconds)} steps)  {cpu:8.2f} cpu-s  ours is {ratio:.2f}x"
            + (f"  {speed * flops_of_token(c.setting.seq_length) / rate:.0%} of the products' rate" if rate else "")
        )
        numbers = (
            ("throughput", speed, "token/s"),
            ("step_time_median", median[name], "s"),
            ("step_time_min", fastest, "s"),
            ("step_time_max", slowest, "s"),
            ("step_cpu_time_median", cpu, "s"),
            ("num_steps", len(c.seconds), "1"),
        )
        rows += [Measurement(name, config, metric, value, unit) for metric, value, unit in numbers]
        if rate is not None:
            share = speed * flops_of_token(c.setting.seq_length) / rate
            rows.append(Measurement(name, config, "share_of_products", share, "1"))
    return rows


def _describe(setting: Setting) -> str:
    text = f"laptop {setting.precision} seq={setting.seq_length} batch={setting.batch_size} threads={setting.threads}"
    return text if setting.processes == 1 else f"{text} processes={setting.processes}"


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Training tokens/s of this library against Transformers.")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=("fp32", "bf16"))
    parser.add_argument("--contenders", nargs="+", choices=(OURS, PIPED, PRODUCTS, *PEERS),
                        help="all that the number of processes allows, where none is named")
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=4, help="sequences a step")
    parser.add_argument("--processes", type=int, default=1, help="processes of each contender")
    add_arguments(parser, steps=5, warm_up=2, budget_s=300.0, limit_s=900.0)
    options = parser.parse_args(arguments)
    piped = [PIPED] if options.processes == NUM_PIPED else []
    options.contenders = options.contenders or [OURS, *piped, PRODUCTS, *PEERS]
    if options.processes < 1 or options.batch_size % options.processes:
        parser.error(f"--processes {options.processes} must divide --batch-size {options.batch_size}")
    if PIPED in options.contenders and not piped:
        parser.error(f"{PIPED} takes --processes {NUM_PIPED}, not {options.processes}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; exit code 1 if a contender failed."""
    options = _parse(arguments)
    if options.serve:
        setting = Setting(**json.loads(options.serve))
        makers = {OURS: ours_step, PIPED: ours_step, PRODUCTS: products_step}
        serve(lambda: makers.get(setting.contender, peer_step)(setting))
        return 0
    groups = ([Setting(name, precision, options.seq_length, options.batch_size, options.threads, options.processes)
               for name in options.contenders] for precision in options.precisions)
    return run_benchmark(__file__, groups, report, "training_throughput.csv", options)


if __name__ == "__main__":
    sys.exit(main())
