"""Attention over ranks that pass latents, against one process's formula in float64, and the elements that travel."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from dsv3_megatron.ops.attention import DocumentBounds
from dsv3_megatron.parallel import latent_ring
from dsv3_megatron.parallel.head_exchange import heads_for_tokens, tokens_for_heads
from dsv3_megatron.parallel.latent_ring import RingAttention
from dsv3_megatron.parallel.narrow_latents import NarrowLatents
from dsv3_megatron.parallel.sequence_parts import SequenceParts
from tests.distributed.launch import run_ranks

pytestmark = pytest.mark.distributed

S, B, N, D, U, LATENT, ROPE = 48, 2, 4, 10, 6, 9, 4
SCALE = 0.3
# Documents that begin and end within chunks, and one that is in parts of all ranks.
BOUNDS: DocumentBounds = ((0, 5, 6, 31, 48), (0, 40, 48))


def whole_tensors() -> tuple[torch.Tensor, ...]:
    """Queries, latents, an expansion, the output's gradient; the same on every rank."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((S, B, N, D), (S, B, LATENT + ROPE), (LATENT, N * (D - ROPE + U)), (S, B, N, U))
    return tuple(torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)


def keys_and_values(latent_SBW: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    key, value = (latent_SBW[..., :LATENT] @ weight).unflatten(-1, (N, -1)).split([D - ROPE, U], dim=-1)
    shared = latent_SBW[..., LATENT:].unsqueeze(2).expand(-1, -1, N, -1)
    return torch.cat([key, shared], -1), value


def expected(bounds: DocumentBounds | None, tensors: tuple[torch.Tensor, ...] | None = None
             ) -> tuple[torch.Tensor, ...]:
    """Output, and gradients of queries, latents and the expansion, of one process."""
    query, latent, weight, grad_out = tensors or whole_tensors()
    leaves = [tensor.requires_grad_() for tensor in (query, latent, weight)]
    key, value = keys_and_values(latent, weight)
    hidden = torch.ones(B, S, S, dtype=torch.bool).triu(1)
    for row, cuts in enumerate(bounds or ()):
        for cut in cuts:
            hidden[row, cut:, :cut] = True
    scores = torch.einsum("sbnd,tbnd->bnst", query, key) * SCALE
    out = torch.einsum("bnst,tbnu->sbnu", scores.masked_fill(hidden.unsqueeze(1), float("-inf")).softmax(-1), value)
    return out.detach(), *torch.autograd.grad(out, leaves, grad_out)


def attend(size: int, way: str, bounds: DocumentBounds | None, dtype: torch.dtype) -> dict[str, Any]:
    """One rank's part of all of it, and the elements that it sent, forward and backward."""
    group = torch.distributed.group.WORLD
    parts = SequenceParts(size, torch.distributed.get_rank())
    query, latent, weight, grad_out = (tensor.to(dtype) for tensor in whole_tensors())
    query, latent, grad_out = (parts.take(tensor, 0) for tensor in (query, latent, grad_out))
    leaves = [tensor.requires_grad_() for tensor in (query, latent, weight)]
    sent: list[int] = []
    own = latent_ring.post_all_to_all

    def counting(rows: torch.Tensor, splits: Any) -> Any:
        sent.append(sum(splits.sent) * rows[0].numel())
        return own(rows, splits)

    latent_ring.post_all_to_all = counting
    try:
        if way == "a2a":
            from dsv3_megatron.ops.attention import causal_attention

            moved = (heads_for_tokens(tensor, parts, group) for tensor in (query, *keys_and_values(latent, weight)))
            out = tokens_for_heads(causal_attention(*moved, softmax_scale=SCALE, document_bounds=bounds), parts, group)
        else:
            ring = RingAttention(lambda block: keys_and_values(block, weight), U, SCALE, parts, group, bounds,
                                 gathers=way == "all_gather")
            out = ring(query, latent)
        forward = sum(sent)
        out.backward(grad_out)
    finally:
        latent_ring.post_all_to_all = own
    return {"out": out.detach(), "grads": [leaf.grad for leaf in leaves], "forward": forward,
            "backward": sum(sent) - forward}


def attend_narrow(way: str) -> dict[str, Any]:
    """One rank's part in fp32, with latents in FP8; the queries come first, for two ranks."""
    group = torch.distributed.group.WORLD
    parts = SequenceParts(2, torch.distributed.get_rank())
    query, latent, weight, grad_out = (tensor.float() for tensor in whole_tensors())
    query, latent, grad_out = (parts.take(tensor, 0) for tensor in (query, latent, grad_out))
    leaves = [tensor.requires_grad_() for tensor in (query, latent, weight)]
    sent: list[int] = []
    own = latent_ring.post_all_to_all

    def counting(rows: torch.Tensor, splits: Any) -> Any:
        sent.append(rows.nbytes)
        return own(rows, splits)

    ring = RingAttention(lambda block: keys_and_values(block, weight), U, SCALE, parts, group, BOUNDS,
                         gathers=way == "all_gather", narrow=NarrowLatents(LATENT))
    with mock.patch.object(latent_ring, "post_all_to_all", counting):
        out = ring(query, latent)
        out.backward(grad_out)
    return {"tensors": [out.detach(), *(leaf.grad for leaf in leaves)], "sent": sent}


def attend_narrow_in_both_ways() -> dict[str, Any]:
    return {way: attend_narrow(way) for way in ("p2p", "all_gather")}


def test_latents_in_fp8_are_rounded_once_whoever_looks_at_them() -> None:
    """Against one process whose latents were rounded, by torch's own cast, before it began."""
    query, latent, weight, grad_out = whole_tensors()
    scale = 2 ** torch.ceil(torch.log2(latent[..., :LATENT].abs().amax(-1, keepdim=True) / 448))
    rounded = (latent[..., :LATENT] / scale).float().to(torch.float8_e4m3fn).double() * scale
    wanted = expected(BOUNDS, (query, torch.cat([rounded, latent[..., LATENT:]], -1), weight, grad_out))
    ranks, whole = run_ranks(2, attend_narrow_in_both_ways), SequenceParts(2)
    for way in ranks[0]:
        found = [rank[way]["tensors"] for rank in ranks]
        actual = [*(whole.join([tensors[index] for tensors in found], 0) for index in (0, 1, 2)),
                  torch.stack([tensors[3] for tensors in found]).sum(0)]
        for tensor, other in zip(actual, wanted, strict=True):
            assert (tensor.double() - other).abs().max() / other.abs().max() < 2e-5, way
    # A byte for each number of a latent, a scale for all of them, the shared key in fp32; the gradient in fp32.
    narrow, wide = (S // 2 * B * size for size in (LATENT + 4 + 4 * ROPE, 4 * (LATENT + ROPE)))
    assert [rank["p2p"]["sent"] for rank in ranks] == [[narrow, narrow, wide]] * 2
    assert [rank["all_gather"]["sent"] for rank in ranks] == [[wide]] * 2


def attend_in_every_way(size: int) -> dict[tuple[str, bool, torch.dtype], dict[str, Any]]:
    return {(way, is_isolated, dtype): attend(size, way, BOUNDS if is_isolated else None, dtype)
            for way in ("p2p", "all_gather", "a2a") for is_isolated in (False, True)
            for dtype in (torch.float64, torch.float32)}


@pytest.mark.parametrize("size", [2, 4])
def test_every_way_is_one_process_s_attention(size: int) -> None:
    ranks = run_ranks(size, attend_in_every_way, size)
    whole = SequenceParts(size)
    for key in ranks[0]:
        way, is_isolated, dtype = key
        found = [rank[key] for rank in ranks]
        grads = [whole.join([rank["grads"][index] for rank in found], 0) for index in (0, 1)]
        actual = [whole.join([rank["out"] for rank in found], 0), *grads,
                  torch.stack([rank["grads"][2] for rank in found]).sum(0)]
        for tensor, wanted in zip(actual, expected(BOUNDS if is_isolated else None), strict=True):
            error = (tensor.double() - wanted).abs().max() / wanted.abs().max()
            assert error < (1e-12 if dtype == torch.float64 else 2e-5), (key, float(error))
        # Each of the other ranks gets a token's latent and shared key once, and in backward again, with a gradient
        # from each.
        numbers = (size - 1) * (S // size) * B * (LATENT + ROPE)
        travelled = {(rank["forward"], rank["backward"]) for rank in found}
        assert travelled == {"p2p": {(numbers, 2 * numbers)}, "all_gather": {(0, numbers)}, "a2a": {(0, 0)}}[way]
