"""Rows as records of FP8 values and scales, and in which direction they are rounded."""

import math

import pytest
import torch

from dsv3_megatron.ops.fp8.packed_rows import pack_rows, unpack_rows
from dsv3_megatron.ops.fp8.quantize import quantize
from dsv3_megatron.ops.fp8.reference_backend import REFERENCE
from dsv3_megatron.parallel.exchange import Splits
from dsv3_megatron.parallel.gated_rows import part
from dsv3_megatron.parallel.narrow_rows import Narrow, exchange_rows, permuted_records, post_narrow


def rows(width, dtype=torch.bfloat16):
    return (torch.randn(5, width, generator=torch.Generator().manual_seed(0)) * 1e-3).to(dtype)


@pytest.mark.parametrize("width", [1, 32, 128, 200])
def test_a_record_is_its_row_in_fp8(width):
    for dtype in (torch.bfloat16, torch.float32):
        x = rows(width, dtype)
        records = pack_rows(x)
        assert records.dtype == torch.uint8 and records.shape == (5, width + 4 * math.ceil(width / 128))
        expected = quantize(x, power_of_2=True).dequantize(dtype)
        assert torch.equal(unpack_rows(records, width, dtype), expected)
        # The experts quantize what came again, and find the same.
        assert torch.equal(quantize(expected, power_of_2=True).dequantize(dtype), expected)


def test_bytes_of_a_token_of_deepseek_v3():
    assert pack_rows(rows(7168)).nbytes == 5 * 7392 and rows(7168).nbytes == 5 * 14336
    for num_rows in (0, 1):
        for width in (128, 30):
            x = rows(width)[:num_rows]
            expected = quantize(x, power_of_2=True).dequantize(x.dtype)
            assert torch.equal(unpack_rows(pack_rows(x), width, x.dtype), expected)


def test_what_is_not_finite_arrives_so():
    x = rows(256)
    x[2, 130] = float("inf")
    got = unpack_rows(pack_rows(x), 256, torch.bfloat16)
    assert got[2, 128:].isnan().all() and torch.isfinite(got[2, :128]).all() and torch.isfinite(got[3]).all()


def test_one_direction_is_rounded():
    x, grad = rows(200).requires_grad_(), rows(200) * 3
    rounded = {"x": quantize(x.detach(), power_of_2=True).dequantize(torch.bfloat16),
               "grad": quantize(grad, power_of_2=True).dequantize(torch.bfloat16)}
    for narrow in ("forward", "backward"):
        x.grad = None
        y = exchange_rows(x, None, Narrow(narrow))
        y.backward(grad)
        assert torch.equal(y, rounded["x"] if narrow == "forward" else x)
        assert torch.equal(x.grad, rounded["grad"] if narrow == "backward" else grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_records_in_the_order_of_experts_are_the_rows_in_that_order(dtype):
    """What is quantized before it is permuted is what is permuted before it is quantized; gradients add up the same."""
    token_of_row, grad = torch.tensor([3, 0, 1, 4, 2, 4, 1, 0, 2, 3]), torch.randn(10, 200).to(dtype)
    grad_gates = torch.randn(10)
    results = []
    for is_early in (True, False):
        x, gates = rows(200, dtype).requires_grad_(), torch.rand(10).requires_grad_()
        if is_early:
            made, narrow = permuted_records(x, token_of_row, gates, REFERENCE)
            assert made.isnan().all() and made.untyped_storage().nbytes() <= 4, "no memory, and no value to trust"
            # 200 values, two scales and a gate, in a multiple of 16 bytes.
            assert narrow.records.shape == (10, 224)
            gated = exchange_rows(made, None, narrow)
            y, y_gates = part(gated, narrow.gated, [10], [0])
        else:
            y, y_gates = exchange_rows(x.index_select(0, token_of_row), None, Narrow("forward")), gates * 1
        torch.autograd.backward([y, y_gates], [grad, grad_gates])
        assert torch.equal(y_gates, gates) and torch.equal(gates.grad, grad_gates)
        results.append((y.detach(), x.grad))
    for early, late in zip(*results, strict=True):
        assert torch.equal(early, late)


def test_a_transfer_carries_bytes_and_gives_back_numbers():
    posted = []

    class Echo:
        def __init__(self, sent, splits):
            posted.append((sent.dtype, sent.nbytes, splits))
            self.sent = sent

        def wait(self):
            return self.sent

    splits = Splits((5,), (5,), None)  # type: ignore[arg-type]
    got = post_narrow(rows(256), splits, Narrow("forward"), Echo).wait()
    assert posted == [(torch.uint8, 5 * (256 + 8), splits)]
    assert torch.equal(got, quantize(rows(256), power_of_2=True).dequantize(torch.bfloat16))
