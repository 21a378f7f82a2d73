"""Rows of a dispatch in their packed form."""

import math

import pytest
import torch

from dsv3_megatron.ops.fp8.packed_rows import pack_rows, unpack_rows
from dsv3_megatron.ops.fp8.reference_backend import REFERENCE
from dsv3_megatron.parallel.gated_rows import part
from dsv3_megatron.parallel.narrow_rows import Narrow, exchange_rows, permuted_records
from tests.unit.kernels.random_rows import random


@pytest.mark.parametrize("width", [144, 32, 30])
def test_records(backend, width):
    """A token quantized once and written to each of its rows; and back. 30: the reference, whose scales are odd."""
    tokens, top_k = 37, 3
    x = random(tokens, width)
    x[5, 7] = math.nan
    rows = torch.randperm(tokens * top_k, generator=torch.Generator().manual_seed(2))
    token_of_row = torch.arange(tokens).repeat(top_k)[rows]
    for order in (None, token_of_row):
        got, expected = backend.pack_rows(x, order), pack_rows(x, order)
        assert got.shape == expected.shape
        for dtype in (torch.bfloat16, torch.float32):
            wide = unpack_rows(expected, width, dtype)
            for again in (backend.unpack_rows(expected, width, dtype), unpack_rows(got, width, dtype)):
                assert again.dtype == dtype and torch.equal(again.nan_to_num(7), wide.nan_to_num(7))
        roomy = backend.pack_rows(x, order, spare=12)
        assert roomy.shape == (len(expected), expected.shape[1] + 12) and torch.equal(roomy[:, :-12], got)
        apart = torch.zeros(len(roomy), width + 8)
        assert backend.unpack_rows(roomy, width, torch.float32, apart[:, :width]).data_ptr() == apart.data_ptr()
        assert torch.equal(apart[:, :width].nan_to_num(7), unpack_rows(got, width, torch.float32).nan_to_num(7))
        assert not apart[:, width:].any()
    assert backend.pack_rows(x[:0], token_of_row[:0]).shape == (0, expected.shape[1])
    assert backend.unpack_rows(expected[:0], width, torch.float32).shape == (0, width)


def test_a_dispatch_on_this_backend(backend):
    """Records in the order of experts, and gradients back, through the functions that the dispatcher calls."""
    token_of_row = torch.tensor([3, 0, 1, 4, 2, 4, 1, 0, 2, 3])
    results = []
    for each in (backend, REFERENCE):
        x, gates = random(5, 144).requires_grad_(), random(10, 1).float().flatten().requires_grad_()
        gated, narrow = permuted_records(x, token_of_row, gates, each)
        sent, sent_gates = part(exchange_rows(gated, None, narrow), narrow.gated, [10], [0])
        back = exchange_rows(sent * sent_gates[:, None].to(sent.dtype), None, Narrow("backward", each))
        back.backward(random(10, 144, seed=1))
        assert torch.equal(sent_gates, gates)
        results.append((sent.detach(), back.detach(), x.grad, gates.grad))
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)
