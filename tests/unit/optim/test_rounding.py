"""Stochastic rounding to bf16: one of two neighbours, the value on average, and noise that can be drawn again."""

from __future__ import annotations

import math

import torch

from dsv3_megatron.optim.rounding import noise_key, noise_table, round_stochastically
from tests.unit.optim.gradients import BF16, gradients

TABLE = noise_table(0, torch.device("cpu"))


def rounded(values: torch.Tensor, key: int) -> torch.Tensor:
    out = torch.empty(values.numel(), dtype=BF16)
    round_stochastically(values.clone(), torch.bitwise_xor(TABLE[:values.numel()], key), out)
    return out


def test_a_value_becomes_one_of_its_neighbours_and_itself_on_average():
    values = torch.cat([gradients(1, 400)[0], gradients(1, 100, 1e-30)[0]])
    total = torch.zeros(500, dtype=torch.float64)
    draws = 4000
    spacing = 2.0 ** (torch.floor(torch.log2(values.abs().double())) - 7)
    for step in range(draws):
        one = rounded(values, noise_key(1, "weight", step, 0)).double()
        assert ((one - values.double()).abs() < spacing).all()
        total += one
    # The mean of `draws` choices between neighbours: at most spacing / 2 / sqrt(draws) a standard deviation; five of
    # them for the worst of 500.
    assert ((total / draws - values.double()).abs() < 5 * spacing / 2 / math.sqrt(draws)).all()


def test_what_bf16_can_say_stays_as_it_is():
    exact = torch.tensor([0.0, -0.0, 1.0, -2.5, 2.0 ** -130, math.inf, -math.inf])
    for key in (0, 1, 0xFFFF):
        assert torch.equal(rounded(exact, key).float(), exact)
        assert rounded(torch.tensor([math.nan]), key).isnan().all()
