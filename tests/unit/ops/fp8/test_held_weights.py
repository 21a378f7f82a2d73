"""Weights that are quantized once where they are constant."""

import torch

from dsv3_megatron.ops.fp8.held_weights import constant_weights
from dsv3_megatron.ops.fp8.linear import fp8_linear
from tests.unit.ops.fp8.layers import (
    DEFAULT,
    SQUARE,
    TILE,
    random,
)


def test_weights_are_quantized_once_where_they_are_constant(monkeypatch):
    from dsv3_megatron.ops.fp8.reference_backend import ReferenceBackend

    counted = []

    class Counting(ReferenceBackend):
        def quantize(self, x, group=TILE, **options):
            counted.extend([group] if group == SQUARE else [])
            return super().quantize(x, group, **options)

    x, weight = random(8, 128), random(128, 128, seed=1).requires_grad_()

    def step():
        counted.clear()
        for _ in range(3):
            fp8_linear(x, weight, DEFAULT, backend=Counting()).sum().backward()
        return len(counted)

    assert step() == 3  # no input gradient asked for; each forward quantizes
    with constant_weights():
        assert step() == 1
        assert step() == 0
    before = fp8_linear(x, weight, DEFAULT)
    weight.data.mul_(2)
    with constant_weights():
        assert not torch.equal(fp8_linear(x, weight, DEFAULT), before), "forgotten at the end"
