"""Attention to blocks is attention to all of them: against the formula in float64, with autograd's gradients."""

from __future__ import annotations

import pytest
import torch

from dsv3_megatron.ops import block_attention
from dsv3_megatron.ops.block_attention import BlockAttention, Region
from dsv3_megatron.ops.fused_blocks import FusedBlockAttention

S, B, N, D, U = 150, 2, 3, 10, 6
SCALE = 0.4
# Blocks of keys, and which queries see them: one block twice in pieces, one that some queries see, and the causal one.
BLOCKS = ((40, (Region((0, 2), (0, S), (0, 15), False), Region((0, 1), (0, S), (15, 40), False),
                Region((1, 2), (100, S), (15, 40), False))),
          (30, (Region((1, 2), (20, 90), (3, 30), False),)),
          (S, (Region((0, 2), (0, 70), (0, 70), True), Region((0, 2), (70, S), (70, S), True))))


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def is_seen() -> list[torch.Tensor]:
    """By block: bool [B, S, C]."""
    masks = []
    for count, regions in BLOCKS:
        mask = torch.zeros(B, S, count, dtype=torch.bool)
        for region in regions:
            queries, keys = slice(*region.queries), slice(*region.keys)
            every = torch.ones(region.queries[1] - region.queries[0], region.keys[1] - region.keys[0], dtype=torch.bool)
            mask[slice(*region.sequences), queries, keys] |= every.tril() if region.is_causal else every
        masks.append(mask)
    return masks


@pytest.mark.parametrize("way", [BlockAttention, FusedBlockAttention])
@pytest.mark.parametrize("tile_bytes", [1 << 20, 4 * 128 * 40 * 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_blocks_make_the_whole_forward_and_backward(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype,
                                                    tolerance: float, tile_bytes: int,
                                                    way: type[BlockAttention | FusedBlockAttention]) -> None:
    monkeypatch.setattr(block_attention, "TILE_BYTES", tile_bytes)
    torch.manual_seed(0)
    q = drawn(S, B, N, D).requires_grad_()
    keys = [drawn(count, B, N, D).requires_grad_() for count, _ in BLOCKS]
    values = [drawn(count, B, N, U).requires_grad_() for count, _ in BLOCKS]
    grad_out = drawn(S, B, N, U)

    scores = torch.einsum("sbnd,tbnd->bnst", q, torch.cat(keys)) * SCALE
    mask = torch.cat(is_seen(), dim=-1).unsqueeze(1)
    expected = torch.einsum("bnst,tbnu->sbnu", scores.masked_fill(~mask, float("-inf")).softmax(-1), torch.cat(values))
    expected.backward(grad_out)

    given = [(k.detach().to(dtype), v.detach().to(dtype), regions)
             for k, v, (_, regions) in zip(keys, values, BLOCKS, strict=True)]
    attention = way(q.detach().to(dtype), U, SCALE)
    seen = attention.forward()
    for k, v, regions in given:
        seen.look(k, v, regions)
    out = seen.output(dtype)
    again = attention.backward(grad_out.to(dtype), out, seen.logsumexp_AS)
    found = [again.look(k, v, regions) for k, v, regions in given]
    pairs = [(out, expected.detach()), (again.grad_q(dtype), q.grad),
             *((pair[0], k.grad) for pair, k in zip(found, keys, strict=True)),
             *((pair[1], v.grad) for pair, v in zip(found, values, strict=True))]
    for actual, wanted in pairs:
        assert actual.dtype == dtype and actual.is_contiguous()
        assert ((actual.double() - wanted).abs().max() / wanted.abs().max()).item() < tolerance


@pytest.mark.parametrize("way", [BlockAttention, FusedBlockAttention])
def test_a_query_that_has_seen_nothing_has_no_weight(way: type[BlockAttention | FusedBlockAttention]) -> None:
    seen = way(torch.randn(4, 1, 1, 3), 2, 1.0).forward()
    seen.look(torch.randn(2, 1, 1, 3), torch.ones(2, 1, 1, 2), (Region((0, 1), (2, 4), (0, 2), False),))
    assert seen.logsumexp_AS.isinf().tolist() == [[True, True, False, False]]
    assert seen.output(torch.float32)[:, 0, 0, 0].tolist() == pytest.approx([0, 0, 1, 1])
