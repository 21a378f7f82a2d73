"""The gradient's norm without a read for each tensor: Megatron-Core's own number, and NaN where it has to be."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from dsv3_megatron.optim.update import apply_gradients, nonfinite_copies, squared_norm


def part_of(counted: list[torch.Tensor], copies: list[torch.Tensor] = ()) -> Any:
    """An optimizer with gradients that count in the norm, and copies that do not."""
    parameters = []
    for gradient in (*counted, *copies):
        parameters.append(torch.nn.Parameter(torch.zeros_like(gradient)))
        parameters[-1].grad = gradient
    return SimpleNamespace(
        prepare_grads=lambda: False, get_grads_for_grad_norm=lambda: counted, get_parameters=lambda: parameters,
        is_stub_optimizer=False, buffers=[1],
        config=SimpleNamespace(use_precision_aware_optimizer_no_fp8_or_ds_fp8=False))


def gradients(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator) * 10.0 ** -(size % 5) for size in (100_003, 17, 4096, 1, 0)]


def test_the_norm_is_megatron_cores_to_the_bit_and_nothing_is_read() -> None:
    from megatron.core.optimizer.clip_grads import get_grad_norm_fp32

    chain = SimpleNamespace(chained_optimizers=[part_of(gradients(0)), part_of(gradients(1)), part_of([])],
                            prepare_grads=lambda: False)
    with mock.patch.object(torch.distributed, "all_reduce"):
        expected = get_grad_norm_fp32(gradients(0) + gradients(1))
    exact = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients(0) + gradients(1)))
    with mock.patch.object(torch.Tensor, "item", side_effect=AssertionError("a read")), \
            mock.patch.object(torch.Tensor, "__float__", side_effect=AssertionError("a read")), \
            mock.patch.object(torch.Tensor, "__bool__", side_effect=AssertionError("a read")):
        square = squared_norm(chain)
    assert square.dtype == torch.float32 and square.shape == ()
    assert square.item() ** 0.5 == expected == pytest.approx(exact, rel=1e-6)


def test_a_rank_without_gradients_adds_nothing() -> None:
    assert squared_norm(part_of([])).item() == 0 and nonfinite_copies(part_of([torch.ones(2)])).item() == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_what_is_not_finite_shows_in_one_of_the_two(bad: float, place: int) -> None:
    both = [gradients(0), gradients(1)]
    part = part_of(*both)
    assert math.isfinite(squared_norm(part)) and nonfinite_copies(part).item() == 0
    both[place][2][7] = bad
    assert math.isfinite(squared_norm(part)) == (place == 1)
    assert math.isnan(nonfinite_copies(part)) == (place == 1)


@pytest.mark.parametrize(("largest", "norm"), [(1.0, 3.7), (1.0, 1.0), (1.0, 0.5), (0.0, 9.0), (2.5, math.inf)])
def test_gradients_are_clipped_as_megatron_core_does_to_the_bit(largest: float, norm: float) -> None:
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    part, expected = part_of(gradients(0)), part_of(gradients(0))
    part.config.clip_grad, part.model_chunks = largest, []
    part.step_with_ready_grads = lambda: True
    memory = [parameter.grad.data_ptr() for parameter in part.get_parameters()]
    apply_gradients(part, norm)
    if largest:
        clip_grad_by_total_norm_fp32(expected.get_parameters(), largest, norm)
    for parameter, other, address in zip(part.get_parameters(), expected.get_parameters(), memory, strict=True):
        assert torch.equal(parameter.grad, other.grad) and parameter.grad.data_ptr() == address
