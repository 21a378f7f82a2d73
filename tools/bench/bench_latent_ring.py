"""A ring that passes latents beside one that passes keys and values: seconds and bytes of attention over ranks.

Each process has its part of a sequence, at DeepSeek-V3's widths: queries and keys of 192, values of 128, latents of 512
and a shared key of 64. The contender makes keys and values of its own tokens once and passes them, as other libraries
do: it makes none again, and 320 elements a head go on where ours are 576 for all heads. Both attend to blocks by the
same code (`RingAttention`), pass in bf16 and send gradients home in fp32. Backward is a part: gradients of queries,
latents and the product that makes keys and values. The rings take turns.

Gloo on one machine is fast, and a core is slow: computing takes so much longer than passing that nothing shows. So what
was run is also played back over links of given speeds (`recorded_link.py`), with the processor time of computing.
`h800` is the link that is as slow beside this core's attention as the network of a node of H800 is beside
FlashAttention 2. With fewer heads than 128 it stands for a rank that has so many under tensor parallelism.

Usage:
    torchrun --standalone --nproc-per-node 4 -m tools.bench.bench_latent_ring
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

REPOSITORY = Path(__file__).resolve().parents[2]
from dsv3_megatron.parallel import latent_ring  # noqa: E402
from dsv3_megatron.parallel.exchange import post_all_to_all  # noqa: E402
from dsv3_megatron.parallel.latent_ring import RingAttention  # noqa: E402
from dsv3_megatron.parallel.narrow_latents import NarrowLatents  # noqa: E402
from dsv3_megatron.parallel.sequence_parts import SequenceParts  # noqa: E402
from dsv3_megatron.planning.machine.hardware_tables import find_hardware  # noqa: E402
from tools.bench.recorded_link import Event, RecordedLink, seconds_over  # noqa: E402
from tools.bench.records import Measurement, append_rows, load_average, warn_of_load  # noqa: E402

LATENT, NOPE, ROPE, VALUE = 512, 128, 64, 128
KEY = NOPE + ROPE
SCALE = KEY ** -0.5
LATENTS, KEYS = "latents", "keys and values"
_CHECKED_LENGTH, _TOLERANCE = 128, 2e-5

# Attention of this rank's queries to all tokens: queries, what is passed of a token, the product to keys and values.
Ring = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Pass:
    """One forward and backward of a ring on this rank.

    Attributes:
        wall_s: Seconds over gloo until the slowest rank is done, forward and in all.
        processor_s: Processor time of the start, of the forward's end and of the end.
        events: Messages.
        tokens: Tokens of this rank, times the ranks that each goes to.
    """

    wall_s: tuple[float, float]
    processor_s: tuple[float, float, float]
    events: list[Event]
    tokens: int

    @property
    def forward_s(self) -> float:
        """Processor time of the forward pass."""
        return self.processor_s[1] - self.processor_s[0]

    def bytes_of_a_token(self, *, is_backward: bool) -> float:
        """What went to each rank that got a token."""
        return sum(event.num_bytes for event in self.events if event.num_bytes is not None
                   and (event.processor_s > self.processor_s[1]) is is_backward) / self.tokens

    def seconds_over(self, bytes_per_s: float) -> float:
        """Both passes over a link, on the slowest rank; called by every rank."""
        seconds = torch.tensor(seconds_over(self.events, self.processor_s[0], self.processor_s[2], bytes_per_s),
                               dtype=torch.float64)
        torch.distributed.all_reduce(seconds, op=torch.distributed.ReduceOp.MAX)
        return float(seconds)


def keys_and_values(passed_SBW: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys [S, B, N, KEY] and values [S, B, N, VALUE] of latents with the shared key behind each."""
    latents, shared = passed_SBW.split([LATENT, ROPE], dim=-1)
    key, value = (latents @ weight).unflatten(-1, (-1, NOPE + VALUE)).split([NOPE, VALUE], dim=-1)
    return torch.cat([key, shared.unsqueeze(2).expand(-1, -1, key.shape[2], -1)], dim=-1), value


def ring_of_latents(query: torch.Tensor, latent: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The library's way."""
    return _ring(lambda block: keys_and_values(block, weight))(query, latent)


def ring_of_keys(query: torch.Tensor, latent: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The contender: this rank's keys and values go round, each head's beside each other."""
    passed = torch.cat(keys_and_values(latent, weight), dim=-1).flatten(2)

    def taken_apart(block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        key, value = block.unflatten(-1, (-1, KEY + VALUE)).split([KEY, VALUE], dim=-1)
        return key, value

    return _ring(taken_apart)(query, passed)


def ring_of_narrow_latents(query: torch.Tensor, latent: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The library's way with `--cp-fp8-latents`; its time is not compared."""
    return _ring(lambda block: keys_and_values(block, weight), NarrowLatents(LATENT))(query, latent)


RINGS: dict[str, Ring] = {LATENTS: ring_of_latents, KEYS: ring_of_keys}


def _ring(expand: latent_ring.Expand, narrow: NarrowLatents | None = None) -> RingAttention:
    group = torch.distributed.group.WORLD
    assert group is not None
    parts = SequenceParts(group.size(), group.rank())
    return RingAttention(expand, VALUE, SCALE, parts, group, None, gathers=False, narrow=narrow)


def own_part(length: int, heads: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Queries, latents and the output's gradient of this rank's tokens, and the product that all ranks have."""
    ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    generator, shared = (torch.Generator().manual_seed(seed) for seed in (1 + rank, 0))
    tokens = length // ranks
    query = torch.randn(tokens, 1, heads, KEY, generator=generator)
    latent = torch.randn(tokens, 1, LATENT + ROPE, generator=generator)
    grad_out = torch.randn(tokens, 1, heads, VALUE, generator=generator)
    weight = torch.randn(LATENT, heads * (NOPE + VALUE), generator=shared) * LATENT ** -0.5
    return tuple(tensor.to(dtype) for tensor in (query, latent, weight, grad_out))


def run(ring: Ring, tensors: tuple[torch.Tensor, ...]) -> Pass:
    """A forward and a backward pass; called by every rank."""
    query, latent, weight = (tensor.detach().requires_grad_() for tensor in tensors[:3])
    link = RecordedLink(post_all_to_all)
    torch.distributed.barrier()
    started, processor = time.perf_counter(), [link.now()]
    with mock.patch.object(latent_ring, "post_all_to_all", link):
        out = ring(query, latent, weight)
        processor.append(link.now())
        forward = time.perf_counter() - started
        out.backward(tensors[3])
        processor.append(link.now())
    wall = torch.tensor([forward, time.perf_counter() - started], dtype=torch.float64)
    torch.distributed.all_reduce(wall, op=torch.distributed.ReduceOp.MAX)
    others = torch.distributed.get_world_size() - 1
    return Pass((float(wall[0]), float(wall[1])), (processor[0], processor[1], processor[2]), link.events,
                others * query.shape[0])


def check_equal(heads: int) -> float:
    """How far apart the two rings are in fp32, relative to the greatest value; called by every rank.

    Raises:
        AssertionError: they do not compute the same.
    """
    found = [results_of(ring, heads, torch.float32) for ring in RINGS.values()]
    apart = max(float((one - other).abs().max() / other.abs().max())
                for one, other in zip(*(each.values() for each in found), strict=True))
    assert apart < _TOLERANCE, f"the rings differ by {apart:.1e}"
    return apart


def results_of(ring: Ring, heads: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Output and gradients of a short sequence by name, in fp32; called by every rank."""
    tensors = own_part(_CHECKED_LENGTH, heads, dtype)
    leaves = [tensor.detach().requires_grad_() for tensor in tensors[:3]]
    out = ring(*leaves)
    out.backward(tensors[3])
    grads = [leaf.grad.float() for leaf in leaves if leaf.grad is not None]
    # Each ring leaves shares of the weight's gradient on other ranks.
    torch.distributed.all_reduce(grads[2])
    return dict(zip(("output", "gradient of queries", "gradient of latents", "gradient of the product"),
                    [out.detach().float(), *grads], strict=True))


def narrow_error(heads: int) -> list[Measurement]:
    """What FP8 on the way does to attention in BF16, beside what BF16 does to fp32, by norm; called by every rank."""
    exact, wide = (results_of(ring_of_latents, heads, dtype) for dtype in (torch.float32, torch.bfloat16))
    narrow = results_of(ring_of_narrow_latents, heads, torch.bfloat16)
    done = run(ring_of_narrow_latents, own_part(_CHECKED_LENGTH, heads, torch.bfloat16))
    config = f"latents in FP8, {heads} heads, S={_CHECKED_LENGTH} CP{torch.distributed.get_world_size()}"
    rows = bytes_of("latents", config, done)
    for way, one, other in (("fp8_to_bf16", narrow, wide), ("bf16_to_fp32", wide, exact)):
        rows += [Measurement("latent_ring", config, f"{way} {name}",
                             float((tensor - other[name]).norm() / other[name].norm()), "1")
                 for name, tensor in one.items()]
    return rows


def attention_flops(length: int, heads: int, ranks: int) -> float:
    """Products of a rank's forward attention: on average a query meets half of the keys."""
    return heads * (KEY + VALUE) * length ** 2 / ranks


def like_h800(flops_per_s: float, length: int, ranks: int) -> float:
    """Bytes a second of the link that is to this machine's attention as an H800's network is to attention to blocks."""
    h800, flops = find_hardware("h800"), 1e12
    seconds = h800.attention_seconds(flops, is_backward=False, seq_length=length // ranks) / h800["block_forward_share"]
    return flops_per_s * h800["network_bandwidth"] * seconds / flops


def bytes_of(way: str, config: str, done: Pass) -> list[Measurement]:
    """Bytes of a token, and its elements, which are bf16 forward; backward there are gradients in fp32 beside them."""
    forward, backward = (done.bytes_of_a_token(is_backward=is_backward) for is_backward in (False, True))
    return [Measurement("latent_ring", config, f"{way} {name}", value, unit) for name, value, unit in (
        ("forward elements", forward / 2, "1"), ("forward bytes", forward, "B"), ("backward bytes", backward, "B"))]


def measure(length: int, heads: int, speeds: list[str], rounds: int) -> list[Measurement]:
    """Run both rings in turns, play them back; what was seen, which is printed; called by every rank."""
    ranks = torch.distributed.get_world_size()
    tensors = own_part(length, heads, torch.bfloat16)
    passes: dict[str, list[Pass]] = {way: [] for way in RINGS}
    for number in range(rounds):
        for way in list(RINGS)[::-1 if number % 2 else 1]:
            passes[way].append(run(RINGS[way], tensors))
    setting = f"{heads} heads, S={length} CP{ranks}"
    rows = [row for way, each in passes.items() for row in bytes_of(way, setting, each[0])]
    fastest = torch.tensor(min(each.forward_s for both in passes.values() for each in both), dtype=torch.float64)
    torch.distributed.all_reduce(fastest, op=torch.distributed.ReduceOp.MIN)
    h800 = like_h800(attention_flops(length, heads, ranks) / float(fastest), length, ranks)
    seconds = {f"gloo, {setting}": {way: [each.wall_s[1] for each in both] for way, both in passes.items()}}
    for name in speeds:
        speed = h800 if name == "h800" else float(name) * 1e6
        config = f"{'like an H800 network, ' if name == 'h800' else ''}{speed / 1e6:.3g} MB/s, {setting}"
        seconds[config] = {way: [each.seconds_over(speed) for each in both] for way, both in passes.items()}
    for config, found in seconds.items():
        ratio = statistics.median(keys / ours for ours, keys in zip(found[LATENTS], found[KEYS], strict=True))
        rows += [*(Measurement("latent_ring", config, f"{way} seconds", statistics.median(each), "s")
                   for way, each in found.items()),
                 Measurement("latent_ring", config, "keys and values to latents", ratio, "1"),
                 Measurement("latent_ring", config, "num_rounds", rounds, "1")]
    return rows


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A ring of latents beside a ring of keys and values.")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384])
    parser.add_argument("--heads", type=int, default=16, help="of a rank, of DeepSeek-V3's 128 (%(default)s)")
    parser.add_argument("--speeds", nargs="+", default=["h800"], help="of links: h800, or MB/s (%(default)s)")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--no-csv", action="store_true", help="print only")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark on this rank."""
    options = _parse(arguments)
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        assert __doc__ is not None
        print(__doc__.partition("Usage:\n")[2].strip(), file=sys.stderr)
        return 2
    from dsv3_megatron.parallel.groups import destroy_groups, start_process_group
    from dsv3_megatron.platform import prepare

    device = prepare()
    torch.set_num_threads(1)
    start_process_group(device)
    is_reporter = torch.distributed.get_rank() == 0
    if is_reporter:
        warn_of_load()
    apart = check_equal(options.heads)
    narrow = narrow_error(options.heads)
    if is_reporter:
        print(f"both rings compute the same in fp32: {apart:.1e} apart", flush=True)
        _keep(narrow, options, device.name)
    for length in options.lengths:
        rows = measure(length, options.heads, options.speeds, options.rounds)
        if is_reporter:
            _keep(rows, options, device.name)
    destroy_groups()
    return 0


def _keep(rows: list[Measurement], options: argparse.Namespace, device: str) -> None:
    print("\n".join(f"{row.config}: {row.metric} {row.value:.4g} {row.unit}" for row in rows), flush=True)
    if not options.no_csv:
        append_rows("context_parallel.csv", rows,
                    f"{device}, {torch.distributed.get_world_size()} processes of 1 thread, load {load_average():.1f}")


if __name__ == "__main__":
    sys.exit(main())
