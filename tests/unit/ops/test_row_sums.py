"""Rows copied and added up, against loops."""

from __future__ import annotations

import pytest
import torch

from dsv3_megatron.ops import row_sums
from dsv3_megatron.ops.row_sums import add_rows, copy_rows, sum_rows


def test_each_is_the_others_backward():
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    places = torch.tensor([4, 0, 0, 2, 4, 4])
    assert torch.equal(copy_rows(x, places), x[places])
    assert torch.autograd.gradcheck(copy_rows, (x, places))
    rows = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    expected = torch.stack([sum((rows[r] for r in range(6) if places[r] == n), torch.zeros(3, dtype=torch.float64))
                            for n in range(5)])
    torch.testing.assert_close(sum_rows(rows, places, 5), expected)
    assert torch.autograd.gradcheck(lambda rows: sum_rows(rows, places, 5), (rows,))


@pytest.mark.parametrize("chunk", [3, 4096])
def test_sums_are_rounded_once(monkeypatch, chunk):
    """256 and eight ones are 264: in bf16, which has 257 to 259 as 256 or 258, adding one by one stays at 256."""
    monkeypatch.setattr(row_sums, "_CHUNK", chunk)
    rows = torch.ones(9, 2, dtype=torch.bfloat16)
    rows[0] = 256
    found = add_rows(rows, torch.zeros(9, dtype=torch.int64), 2, torch.bfloat16)
    assert found.dtype == torch.bfloat16 and found.tolist() == [[264, 264], [0, 0]]
    weight = torch.ones(1, 2, dtype=torch.bfloat16, requires_grad=True)
    copy_rows(weight, torch.zeros(9, dtype=torch.int64)).backward(rows)
    assert weight.grad.tolist() == [[264, 264]]
