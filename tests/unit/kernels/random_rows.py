"""Random rows of many sizes of number."""

import torch

from dsv3_megatron.ops.fp8.quantize import Quantized


def random(*shape, seed=0, dtype=torch.bfloat16):
    stream = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=stream) * torch.exp(torch.randn(shape, generator=stream))).to(dtype)


def same(got: Quantized, expected: Quantized) -> None:
    assert got.shape == expected.shape and got.group == expected.group
    assert torch.equal(got.scales, expected.scales)
    assert torch.equal(got.values.float(), expected.values.float())
