"""Rows with their gates behind them: nothing is lost, whatever the dtypes, and gradients come back to their places."""

from __future__ import annotations

import pytest
import torch

from dsv3_megatron.ops.row_bytes import gated_bytes
from dsv3_megatron.parallel.gated_rows import GatedRow, join, part

TOKEN_OF_ROW = torch.tensor([3, 0, 1, 4, 2, 4, 1, 0, 2, 3])
SIZES, ORDER = [2, 0, 3, 1, 4], [4, 1, 0, 3, 2]


def randn(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_bytes_of_a_row_of_deepseek_v3() -> None:
    row = GatedRow(7168, torch.bfloat16)
    assert row.num_columns * 2 == gated_bytes(2 * 7168) == 14352
    assert gated_bytes(7392) == 7408, "its record in FP8"
    assert gated_bytes(12) == 16 and gated_bytes(13) == 32


@pytest.mark.parametrize(("dtype", "gate_dtype"), [
    (torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)])
@pytest.mark.parametrize("width", [1, 7, 8, 33])
def test_what_is_joined_is_parted_bit_for_bit(dtype: torch.dtype, gate_dtype: torch.dtype, width: int) -> None:
    """Against the same rows and gates that are moved apart from each other, by torch's own functions."""
    results = []
    for is_joined in (True, False):
        x = randn(5, width, dtype=dtype, seed=0).requires_grad_()
        gates = randn(10, dtype=gate_dtype, seed=1).requires_grad_()
        with torch.no_grad():  # bits that are no numbers in the rows' dtype, and none in the gates'
            gates[2], gates[5] = float("nan"), torch.finfo(gate_dtype).tiny / 4
        if is_joined:
            gated = join(x, TOKEN_OF_ROW, gates)
            assert gated.dtype == dtype
            assert gated.nbytes == 10 * gated_bytes(width * dtype.itemsize, gate_dtype.itemsize)
            rows, row_gates = part(gated, GatedRow(width, dtype, gate_dtype), SIZES, ORDER)
        else:
            chunks, gate_chunks = x.index_select(0, TOKEN_OF_ROW).split(SIZES), gates.split(SIZES)
            rows, row_gates = torch.cat([chunks[i] for i in ORDER]), torch.cat([gate_chunks[i] for i in ORDER])
        assert rows.is_contiguous() and row_gates.is_contiguous()
        torch.autograd.backward([rows, row_gates], [randn(10, width, dtype=dtype, seed=2),
                                                    randn(10, dtype=gate_dtype, seed=3)])
        results.append([t.detach().view(torch.uint8) for t in (rows, row_gates, x.grad, gates.grad)])
    assert all(torch.equal(joined, apart) for joined, apart in zip(*results, strict=True))


def test_no_rows_and_one_row() -> None:
    for num_rows in (0, 1):
        x, gates = randn(1, 3, dtype=torch.bfloat16, seed=0), randn(num_rows, dtype=torch.float32, seed=1)
        gated = join(x, torch.zeros(num_rows, dtype=torch.long), gates)
        rows, row_gates = part(gated, GatedRow(3, torch.bfloat16), [num_rows], [0])
        assert torch.equal(rows, x[:num_rows]) and torch.equal(row_gates, gates)


def test_what_stands_for_records_has_no_memory_and_the_same_gradients() -> None:
    grads = []
    for has_values in (True, False):
        x = randn(5, 8, dtype=torch.bfloat16, seed=0).requires_grad_()
        gates = randn(10, dtype=torch.float32, seed=1).requires_grad_()
        gated = join(x, TOKEN_OF_ROW, gates, has_values=has_values)
        assert has_values or gated.untyped_storage().nbytes() <= 2
        gated.backward(join(randn(5, 8, dtype=torch.bfloat16, seed=2), TOKEN_OF_ROW, gates.detach() * 3))
        grads.append((x.grad, gates.grad))
        assert torch.equal(gates.grad, gates * 3)
    assert torch.equal(grads[0][0], grads[1][0])
