"""Attention over cached positions, head by head and position by position in float64."""

import pytest
import torch

from dsv3_megatron.generation.decode import absorbed_attention, full_attention, tile_attention

ROWS, QUERIES, POSITIONS, HEADS, NOPE, ROPE, LATENT, VALUE = 2, 3, 5, 2, 4, 2, 6, 3
SCALE = 0.37


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def slow(query_BQND, keys_BNCD, values_BNCV, hidden_BQC):
    """One sum after the other."""
    out = torch.zeros(ROWS, QUERIES, HEADS, VALUE, dtype=torch.float64)
    for b in range(ROWS):
        for q in range(QUERIES):
            seen = [c for c in range(POSITIONS) if hidden_BQC is None or not hidden_BQC[b, q, c]]
            for n in range(HEADS):
                weights = torch.tensor([float(SCALE * query_BQND[b, q, n] @ keys_BNCD[b, n, c]) for c in seen],
                                       dtype=torch.float64).exp()
                out[b, q, n] = sum(w * values_BNCV[b, n, c] for w, c in zip(weights, seen, strict=True)) / weights.sum()
    return out.flatten(0, 1)


@pytest.fixture(params=[False, True], ids=["all", "causal"])
def hidden(request):
    """Nothing, or what lies behind a query that is one of the last positions."""
    if not request.param:
        return None
    behind = torch.arange(POSITIONS)[None, :] > torch.arange(POSITIONS - QUERIES, POSITIONS)[:, None]
    return behind.expand(ROWS, -1, -1)


@pytest.fixture
def case():
    entries_BCW = randn(ROWS, POSITIONS, LATENT + ROPE)
    up_NEK, up_NVK = randn(HEADS, NOPE, LATENT), randn(HEADS, VALUE, LATENT)
    query_BQND = randn(ROWS, QUERIES, HEADS, NOPE + ROPE)
    latent_BCK, rope_BCR = entries_BCW.split([LATENT, ROPE], dim=-1)
    keys_BNCD = torch.cat([torch.einsum("nek,bck->bnce", up_NEK, latent_BCK),
                           rope_BCR[:, None].expand(-1, HEADS, -1, -1)], dim=-1)
    return query_BQND, entries_BCW, up_NEK, up_NVK, keys_BNCD, torch.einsum("nvk,bck->bncv", up_NVK, latent_BCK)


@pytest.mark.parametrize("attention", [full_attention, tile_attention])
def test_full(case, hidden, attention):
    query_BQND, *_, keys_BNCD, values_BNCV = case
    found = attention(query_BQND.flatten(0, 1), keys_BNCD, values_BNCV, softmax_scale=SCALE, hidden_BQC=hidden)
    torch.testing.assert_close(found, slow(query_BQND, keys_BNCD, values_BNCV, hidden))


def test_absorbed(case, hidden):
    """Over latents, without keys and values of each head: the same."""
    query_BQND, entries_BCW, up_NEK, up_NVK, keys_BNCD, values_BNCV = case
    found = absorbed_attention(query_BQND.flatten(0, 1), entries_BCW, up_NEK, up_NVK, softmax_scale=SCALE,
                               hidden_BQC=hidden)
    torch.testing.assert_close(found, slow(query_BQND, keys_BNCD, values_BNCV, hidden))


def test_bf16_is_bf16(case):
    query_BQND, *_, keys_BNCD, values_BNCV = (t.bfloat16() for t in case)
    found = full_attention(query_BQND.flatten(0, 1), keys_BNCD, values_BNCV, softmax_scale=SCALE)
    assert found.dtype == torch.bfloat16
    expected = slow(*(t.double() for t in (query_BQND, keys_BNCD, values_BNCV)), None)
    # Scores, probabilities and sums are rounded to bf16 (2^-9) one after the other.
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=4 * 2**-9 * expected.abs().max().item())
