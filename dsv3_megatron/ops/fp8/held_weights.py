"""Weights in FP8, quantized once for all the micro-batches of an optimizer step.

What changes a weight (an optimizer, a checkpoint, an all-gather into a flat buffer) leaves no trace that could be
trusted, so nothing is remembered unless the caller says over which code weights stay as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from dsv3_megatron.ops.fp8.quantize import Quantized

# By weight and kind of scales; the weight is held so that no other can take its id. None: nothing is remembered.
_remembered: dict[tuple[int, bool], tuple[torch.Tensor, Quantized]] | None = None


@contextlib.contextmanager
def constant_weights() -> Iterator[None]:
    """Promise that no weight changes inside: each is quantized there once, and forgotten at the end."""
    global _remembered
    outer, _remembered = _remembered, {} if _remembered is None else _remembered
    try:
        yield
    finally:
        _remembered = outer


def quantized_weight(weight: torch.Tensor, quantize: Callable[[torch.Tensor], Quantized], *, power_of_2: bool
                     ) -> Quantized:
    """The weight in FP8: `quantize(weight)`, or what it gave before inside `constant_weights`."""
    if _remembered is None:
        return quantize(weight.detach())
    key = (id(weight), power_of_2)
    if key not in _remembered:
        _remembered[key] = (weight, quantize(weight.detach()))
    return _remembered[key][1]
