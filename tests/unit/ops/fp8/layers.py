"""Inputs of FP8 layers, and what their gradients are compared by."""

import dataclasses

import torch

from dsv3_megatron.config.precision import LinearPrecision
from tests.slow_fp8 import rounded

TILE, SQUARE = (1, 128), (128, 128)

DEFAULT = LinearPrecision()


def columns(x, power_of_2=False):
    return rounded(x.t(), TILE, power_of_2=power_of_2).t()


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_gradients(function, inputs, grad):
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    y = function(*leaves)
    return y, *torch.autograd.grad(y, leaves, grad)


def close(got, expected, dtype=torch.float32):
    """Equal but for sums in fp32, and the result's own rounding."""
    tolerance = 2**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def relative_error(got, expected):
    return ((got.double() - expected).norm() / expected.norm()).item()


COUNTS = [70, 0, 133, 1]

FIRST = dataclasses.replace(DEFAULT, input_scales="power_of_2")
