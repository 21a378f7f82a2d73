"""A ring that passes latents beside one that passes keys and values: seconds and bytes of attention over ranks.

Each process has its part of a sequence, at DeepSeek-V3's widths: queries and keys of 192, values of 128, latents of 512
and a shared key of 64. The contender makes keys and values of its own tokens once and passes them, as other libraries
do: it makes none again, and 320 elements a head go on where ours are 576 for all heads. Both attend to blocks by the
same code (`RingAttention`), pass in bf16 and send gradients home in fp32. Backward is a part: gradients of queries,
latents and the product that makes keys and values. The rings take turns.

Gloo on one machine is fast, and a core is slow: computing takes so much longer than passing that nothing shows. So
each ring also runs over links of known speeds, on which a rank sends one message after the other (`SlowLink`). `h800`
is the link that is as slow beside this machine's attention as the network of a node of H800 is beside FlashAttention 2.
With fewer heads than 128 it stands for a rank that has so many under tensor parallelism.

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
from tools.bench.records import Measurement, append_rows, warn_of_load  # noqa: E402
from tools.bench.timed_segments import SlowLink, WallClock  # noqa: E402

LATENT, NOPE, ROPE, VALUE = 512, 128, 64, 128
KEY = NOPE + ROPE
SCALE = KEY ** -0.5
LATENTS, KEYS = "latents", "keys and values"
_CHECKED_LENGTH, _TOLERANCE = 128, 2e-5

# Attention of this rank's queries to all tokens: queries, what is passed of a token, the product to keys and values.
Ring = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Pass:
    """One forward and backward of a ring, until the slowest rank is done.

    Attributes:
        seconds: Of both passes.
        forward_s: Of the forward pass.
        forward_bytes: What this rank has sent forward, for each of its tokens and each rank that it went to.
        backward_bytes: The same, backward.
    """

    seconds: float
    forward_s: float
    forward_bytes: float
    backward_bytes: float


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


def timed(ring: Ring, tensors: tuple[torch.Tensor, ...], link: SlowLink) -> Pass:
    """A forward and a backward pass over a link; called by every rank."""
    query, latent, weight = (tensor.detach().requires_grad_() for tensor in tensors[:3])
    link.sent_bytes = 0
    others = (torch.distributed.get_world_size() - 1) * query.shape[0]
    torch.distributed.barrier()
    started = time.perf_counter()
    with mock.patch.object(latent_ring, "post_all_to_all", link):
        out = ring(query, latent, weight)
        forward_s, forward_bytes = time.perf_counter() - started, link.sent_bytes
        out.backward(tensors[3])
    seconds = torch.tensor([time.perf_counter() - started, forward_s], dtype=torch.float64)
    torch.distributed.all_reduce(seconds, op=torch.distributed.ReduceOp.MAX)
    return Pass(float(seconds[0]), float(seconds[1]), forward_bytes / others,
                (link.sent_bytes - forward_bytes) / others)


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


def narrow_error(heads: int, link: SlowLink) -> list[Measurement]:
    """What FP8 on the way does to attention in BF16, beside what BF16 does to fp32, by norm; called by every rank."""
    exact, wide = (results_of(ring_of_latents, heads, dtype) for dtype in (torch.float32, torch.bfloat16))
    narrow = results_of(ring_of_narrow_latents, heads, torch.bfloat16)
    done = timed(ring_of_narrow_latents, own_part(_CHECKED_LENGTH, heads, torch.bfloat16), link)
    config = f"latents in FP8, {heads} heads, S={_CHECKED_LENGTH} CP{torch.distributed.get_world_size()}"
    rows = [Measurement("latent_ring", config, name, value, "B")
            for name, value in (("forward_bytes", done.forward_bytes), ("backward_bytes", done.backward_bytes))]
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


def measure(length: int, heads: int, links: list[str], rounds: int) -> dict[str, tuple[float, dict[str, list[Pass]]]]:
    """Passes of both rings by link, with its bytes a second; called by every rank."""
    ranks = torch.distributed.get_world_size()
    tensors = own_part(length, heads, torch.bfloat16)
    found: dict[str, tuple[float, dict[str, list[Pass]]]] = {}
    for name in links:
        if name == "h800":
            own = min(each.forward_s for both in found["loopback"][1].values() for each in both)
            speed = like_h800(attention_flops(length, heads, ranks) / own, length, ranks)
        else:
            speed = float("inf") if name == "loopback" else float(name) * 1e6
        link = SlowLink(WallClock(), post_all_to_all, speed)
        passes: dict[str, list[Pass]] = {way: [] for way in RINGS}
        for number in range(rounds):
            for way in list(RINGS)[::-1 if number % 2 else 1]:
                passes[way].append(timed(RINGS[way], tensors, link))
        found[name] = speed, passes
    return found


def report(length: int, heads: int, found: dict[str, tuple[float, dict[str, list[Pass]]]]) -> list[Measurement]:
    """Print a table; return its numbers."""
    rows, ranks = [], torch.distributed.get_world_size()
    for name, (speed, passes) in found.items():
        link = name if name == "loopback" else f"{speed / 1e6:.3g} MB/s" + (" (h800)" if name == "h800" else "")
        config = f"ring over {link}, {heads} heads, S={length} CP{ranks}"
        ratio = statistics.median(keys.seconds / ours.seconds
                                  for ours, keys in zip(passes[LATENTS], passes[KEYS], strict=True))
        told = []
        for way, each in passes.items():
            seconds, forward_s = (statistics.median(getattr(one, value) for one in each)
                                  for value in ("seconds", "forward_s"))
            told.append(f"{way} {seconds:.2f} s (forward {forward_s:.2f}), {each[0].forward_bytes:.0f} B forward and "
                        f"{each[0].backward_bytes:.0f} B backward of a token")
            metric = way.replace(" ", "_")
            rows += [Measurement("latent_ring", config, f"{metric}_{value}", number, unit) for value, number, unit in (
                ("seconds", seconds, "s"), ("forward_seconds", forward_s, "s"),
                ("forward_elements", each[0].forward_bytes / 2, "1"), ("forward_bytes", each[0].forward_bytes, "B"),
                ("backward_bytes", each[0].backward_bytes, "B"))]
        rows += [Measurement("latent_ring", config, "keys_to_latents", ratio, "1"),
                 Measurement("latent_ring", config, "num_rounds", len(passes[KEYS]), "1")]
        print(f"{config}: {'; '.join(told)}; {ratio:.2f} times as long", flush=True)
    return rows


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A ring of latents beside a ring of keys and values.")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384])
    parser.add_argument("--heads", type=int, default=16, help="of a rank, of DeepSeek-V3's 128 (%(default)s)")
    parser.add_argument("--links", nargs="+", default=["loopback", "h800"],
                        help="loopback, h800 (behind loopback), or MB/s (%(default)s)")
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
    narrow = narrow_error(options.heads, SlowLink(WallClock(), post_all_to_all, float("inf")))
    if is_reporter:
        print(f"both rings compute the same in fp32: {apart:.1e} apart", flush=True)
        print("\n".join(f"{row.config}: {row.metric} {row.value:.3g} {row.unit}" for row in narrow), flush=True)
        _keep(narrow, options, device.name)
    for length in options.lengths:
        found = measure(length, options.heads, options.links, options.rounds)
        if is_reporter:
            _keep(report(length, options.heads, found), options, device.name)
    destroy_groups()
    return 0


def _keep(rows: list[Measurement], options: argparse.Namespace, device: str) -> None:
    if not options.no_csv:
        append_rows("context_parallel.csv", rows,
                    f"{device}, {torch.distributed.get_world_size()} processes of 1 thread")


if __name__ == "__main__":
    sys.exit(main())
