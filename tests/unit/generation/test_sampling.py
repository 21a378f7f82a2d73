"""Distributions and draws: against the formula, against plain loops, and at the edges."""

from __future__ import annotations

import math

import pytest
import torch

from dsv3_megatron.generation.sampling import Sampling, UniformStreams, distribution, draw
from dsv3_megatron.model.init import parameter_seed


def test_temperature_divides_the_logits() -> None:
    logits = torch.tensor([[0.0, 1.0, 3.0]])
    weights = [math.exp(value / 0.5) for value in (0.0, 1.0, 3.0)]
    found = distribution(logits, Sampling(0.5))[0]
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([weight / sum(weights) for weight in weights], rel=1e-12)


@pytest.mark.parametrize("temperature", [5e-324, 1e-308, 1e-200, 1e-30])
@pytest.mark.parametrize("top_p", [1.0, 1e-300])
def test_a_tiny_temperature_is_certain(temperature: float, top_p: float) -> None:
    """Logits divided by it would be infinite; equal largest ones share the probability."""
    found = distribution(torch.tensor([[1.0, 5.0, -9.0], [-3.0, -4.0, -5.0]]), Sampling(temperature, top_p))
    assert found.tolist() == [[0, 1, 0], [1, 0, 0]]
    shared = distribution(torch.tensor([[7.0, 7.0, 1.0]]), Sampling(temperature, 1.0))
    assert shared.tolist() == [[0.5, 0.5, 0]]


def test_greedy_is_certain_of_the_first_largest() -> None:
    assert distribution(torch.tensor([[1.0, 5.0, 5.0], [2.0, 1.0, 0.0]]), Sampling()).tolist() == [[0, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize("top_p, kept", [
    (0.05, {1}), (0.4, {1}), (0.5, {1, 3}), (0.75, {1, 3, 0}), (1.0, {0, 1, 2, 3})])
def test_the_nucleus_is_the_smallest_set_with_enough_probability(top_p: float, kept: set[int]) -> None:
    probabilities = torch.tensor([[0.2, 0.45, 0.1, 0.25]], dtype=torch.float64)
    found = distribution(probabilities.log(), Sampling(1.0, top_p))[0]
    total = sum(probabilities[0, token].item() for token in kept)
    expected = [probabilities[0, token].item() / total if token in kept else 0.0 for token in range(4)]
    assert found.tolist() == pytest.approx(expected)


def test_each_row_has_a_nucleus_of_its_own() -> None:
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(0)) * 3
    together = distribution(logits, Sampling(0.7, 0.8))
    for row in range(50):
        assert torch.equal(together[row], distribution(logits[row: row + 1], Sampling(0.7, 0.8))[0])
    assert len({int((row > 0).sum()) for row in together}) > 3


def test_a_draw_inverts_the_cumulative_weights() -> None:
    weights = torch.tensor([[0.0, 2.0, 0.0, 1.0, 1.0, 0.0]], dtype=torch.float64)
    cases = {0.0: 1, 0.25: 1, 0.4999: 1, 0.5: 3, 0.7499: 3, 0.75: 4, 1 - 2**-53: 4}
    for uniform, token in cases.items():
        assert draw(weights, torch.tensor([uniform], dtype=torch.float64)).tolist() == [token]


@pytest.mark.parametrize("scale", [1e-300, 1 / 3, 1.0, 1e10])
def test_the_largest_number_never_draws_what_has_no_weight(scale: float) -> None:
    weights = torch.rand(200, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * scale
    weights[:, 4:] = 0
    found = draw(weights, torch.full((200,), 1 - 2**-53, dtype=torch.float64))
    assert set(found.tolist()) <= {0, 1, 2, 3}


def test_streams_belong_to_the_prompt_and_the_seed() -> None:
    together, alone = UniformStreams(7, range(4)), UniformStreams(7, [2])
    first = together.take(3)
    assert torch.equal(first[2:3], alone.take(3)) and first.dtype == torch.float64
    together.keep([2])
    assert torch.equal(together.take(2), alone.take(2))
    assert len({tuple(row.tolist()) for row in first}) == 4
    assert not torch.equal(first, UniformStreams(8, range(4)).take(3))
    assert (0 <= first).all() and (first < 1).all()


@pytest.mark.parametrize("sampling, message", [
    (Sampling(-0.1), "temperature=-0.1 must be a number from 0 on; 0 takes the likeliest token"),
    (Sampling(math.nan), "temperature=nan must be a number"), (Sampling(math.inf), "temperature=inf must be a number"),
    (Sampling(1.0, 0.0), "top_p=0.0 must be above 0 and at most 1"), (Sampling(1.0, 1.1), "top_p=1.1 must be above 0"),
    (Sampling(1.0, math.nan), "top_p=nan must be above 0"),
    (Sampling(0.0, 0.9), "top_p=0.9 has no effect with temperature=0"), (Sampling(1.0, seed=-1), "seed=-1 must not be"),
])
def test_what_is_out_of_range(sampling: Sampling, message: str) -> None:
    with pytest.raises(ValueError) as error:
        sampling.validate()
    assert message in str(error.value)


def test_uniform_numbers_are_those_of_a_generator_asked_one_by_one():
    """However many are taken at once, and whoever leaves on the way."""
    streams = UniformStreams(7, [3, 5, 9])
    taken = [streams.take(count) for count in (1, 2, 40, 1, 31)]
    streams.keep([2, 0])
    taken = [torch.cat(taken, dim=1)[[2, 0]], streams.take(2), streams.take(50)]
    for row, number in enumerate((9, 3)):
        generator = torch.Generator().manual_seed(parameter_seed(7, f"prompt {number}"))
        expected = [torch.rand((), dtype=torch.float64, generator=generator) for _ in range(127)]
        assert torch.cat([part[row] for part in taken]).tolist() == [float(value) for value in expected]
