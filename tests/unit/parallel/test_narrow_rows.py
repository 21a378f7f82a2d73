"""Rows as records of FP8 values and scales, and in which direction they are rounded."""

import math

import pytest
import torch

from dsv3_megatron.ops.fp8_quantize import quantize
from dsv3_megatron.parallel.exchange import Splits
from dsv3_megatron.parallel.narrow_rows import exchange_rows, pack_rows, post_narrow, unpack_rows


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
    assert unpack_rows(pack_rows(rows(128)[:0]), 128, torch.bfloat16).shape == (0, 128)


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
        y = exchange_rows(x, None, narrow=narrow)
        y.backward(grad)
        assert torch.equal(y, rounded["x"] if narrow == "forward" else x)
        assert torch.equal(x.grad, rounded["grad"] if narrow == "backward" else grad)


def test_a_transfer_carries_bytes_and_gives_back_numbers():
    posted = []

    class Echo:
        def __init__(self, sent, splits):
            posted.append((sent.dtype, sent.nbytes, splits))
            self.sent = sent

        def wait(self):
            return self.sent

    splits = Splits((5,), (5,), None)  # type: ignore[arg-type]
    got = post_narrow(rows(256), splits, Echo).wait()
    assert posted == [(torch.uint8, 5 * (256 + 8), splits)]
    assert torch.equal(got, quantize(rows(256), power_of_2=True).dequantize(torch.bfloat16))
