"""Rows of a dispatch in their packed form."""

import math

import pytest
import torch

from dsv3_megatron.ops.fp8.packed_rows import pack_rows, unpack_rows
from dsv3_megatron.ops.fp8.reference_backend import REFERENCE
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
    assert backend.pack_rows(x[:0], token_of_row[:0]).shape == (0, expected.shape[1])
    assert backend.unpack_rows(expected[:0], width, torch.float32).shape == (0, width)


def test_a_dispatch_on_this_backend(backend):
    """Records in the order of experts, and gradients back, through the functions that the dispatcher calls."""
    token_of_row = torch.tensor([3, 0, 1, 4, 2, 4, 1, 0, 2, 3])
    results = []
    for each in (backend, REFERENCE):
        x = random(5, 144).requires_grad_()
        rows, records = permuted_records(x, token_of_row, each)
        sent = exchange_rows(rows, None, Narrow("forward", each, records))
        back = exchange_rows(sent * 2, None, Narrow("backward", each))
        back.backward(random(10, 144, seed=1))
        results.append((sent.detach(), back.detach(), x.grad))
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)
