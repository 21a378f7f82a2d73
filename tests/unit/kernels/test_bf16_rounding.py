"""Rounding to bf16 under the interpreter, against torch's."""

import torch
import triton
import triton.language as tl

from dsv3_megatron.kernels.bf16_rounding import round_to


@triton.jit
def _round(x_ptr, y_ptr, SIZE: tl.constexpr, DTYPE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(y_ptr + at, round_to(tl.load(x_ptr + at), DTYPE, True))


def test_it_is_to_nearest_even_and_keeps_what_is_not_finite():
    step = 2.0**-7
    cases = [1.0, 1 + step / 2, 1 + 3 * step / 2, 1 + step * 0.51, -1 - step * 0.49, 0.0, -0.0, 3.4e38, -1.2e-38,
             float("inf"), -float("inf"), float("nan")]
    x = torch.cat([torch.tensor(cases), torch.randn(1024 - len(cases), generator=torch.Generator().manual_seed(0))])
    for dtype, name in ((torch.bfloat16, tl.bfloat16), (torch.float32, tl.float32)):
        y = torch.empty(1024, dtype=dtype)
        _round[(1,)](x, y, SIZE=1024, DTYPE=name)
        torch.testing.assert_close(y, x.to(dtype), rtol=0, atol=0, equal_nan=True)
