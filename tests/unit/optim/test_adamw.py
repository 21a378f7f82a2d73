"""AdamW with narrow moments: torch's arithmetic, what rounding does to it, and noise that can be drawn again."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.presets import preset
from dsv3_megatron.optim.adamw import NarrowMomentAdamW
from dsv3_megatron.optim.rounding import BLOCK
from dsv3_megatron.optim.shards import Named, ParameterShard
from tests.unit.optim.gradients import BF16, FP32, gradients

SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def make(pieces: list[tuple[torch.Tensor, int]], *, rounding: str = "nearest", seed: int = 7, name: str = "weight",
         dtypes: tuple[torch.dtype, torch.dtype] = (BF16, BF16), **settings: Any) -> NarrowMomentAdamW:
    """An optimizer over parts (values, first element) of one parameter."""
    weights = [torch.nn.Parameter(values.clone()) for values, _ in pieces]
    shards = [ParameterShard(weight, weight, first, first + weight.numel(), None,
                             (Named(name, 0, weight.numel(), first),))
              for weight, (_, first) in zip(weights, pieces, strict=True)]
    groups = torch.optim.AdamW(weights, **{**SETTINGS, **settings}).param_groups
    return NarrowMomentAdamW(groups, shards, exp_avg_dtype=dtypes[0], exp_avg_sq_dtype=dtypes[1],
                             is_stochastic=rounding == "stochastic", seed=seed)


def weights_of(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return list(optimizer.param_groups[0]["params"])


def run(optimizer: torch.optim.Optimizer, gradients: list[torch.Tensor], firsts: list[int] | None = None) -> None:
    """One step for each whole gradient, of which each weight gets its part."""
    weights = weights_of(optimizer)
    for gradient in gradients:
        for weight, first in zip(weights, firsts or [0], strict=True):
            weight.grad = gradient[first: first + weight.numel()].clone()
        optimizer.step()


def test_with_fp32_moments_it_is_torchs_fused_adamw_bit_for_bit():
    values = gradients(1, BLOCK + 1000)[0]
    ours = make([(values, 0)], dtypes=(FP32, FP32))
    theirs = torch.optim.AdamW([torch.nn.Parameter(values.clone())], fused=True, **SETTINGS)
    for optimizer in (ours, theirs):
        run(optimizer, gradients(4, values.numel()))
    mine, other = weights_of(ours)[0], weights_of(theirs)[0]
    assert torch.equal(mine, other)
    for moment in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(ours.state[mine][moment], theirs.state[other][moment])


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (FP32, BF16), (BF16, FP32)], ids=str)
def test_rounding_to_nearest_is_the_formula_with_rounded_moments(dtypes):
    values = gradients(1, 5000)[0]
    optimizer = make([(values, 0)], dtypes=dtypes)
    steps = gradients(5, values.numel())
    run(optimizer, steps)
    weight, first, second = values.clone(), torch.zeros(5000), torch.zeros(5000)
    for number, gradient in enumerate(steps, start=1):
        weight *= 1 - 1e-2 * 0.1
        first = 0.9 * first + 0.1 * gradient
        second = 0.95 * second + 0.05 * gradient * gradient
        denominator = (second / (1 - 0.95 ** number)).sqrt() + 1e-8
        weight -= 1e-2 * (first / (1 - 0.9 ** number)) / denominator
        first, second = first.to(dtypes[0]).float(), second.to(dtypes[1]).float()
    # fp32 in another order; where a moment is next to a rounding boundary it may take the other neighbour, 2^-8 away.
    torch.testing.assert_close(weights_of(optimizer)[0].data, weight, rtol=0, atol=4e-4)
    assert (weights_of(optimizer)[0] - weight).abs().median() < 1e-6
    state = optimizer.state[weights_of(optimizer)[0]]
    assert (state["exp_avg"].dtype, state["exp_avg_sq"].dtype) == dtypes
    torch.testing.assert_close(state["exp_avg_sq"].float(), second, rtol=2 ** -7, atol=0)


def test_bf16_moments_take_four_bytes_a_parameter():
    optimizer = make([(torch.ones(3000), 0)])
    optimizer.allocate_state()
    assert sum(tensor.nbytes for tensor in optimizer.state[weights_of(optimizer)[0]].values() if tensor.dim()) == 12000


# ---- stochastic rounding ----


def state_bits(optimizer: NarrowMomentAdamW, moment: str) -> torch.Tensor:
    return torch.cat([optimizer.state[weight][moment] for weight in weights_of(optimizer)]).view(torch.int16)


def test_noise_depends_on_seed_name_and_step_and_not_on_the_split():
    size, cut = BLOCK + 500, 1234
    values, steps = gradients(1, size)[0], gradients(3, size)
    whole, again = (make([(values, 0)], rounding="stochastic") for _ in range(2))
    split = make([(values[:cut], 0), (values[cut:], cut)], rounding="stochastic")
    seed = make([(values, 0)], rounding="stochastic", seed=8)
    name = make([(values, 0)], rounding="stochastic", name="other")
    for optimizer in (whole, again, seed, name):
        run(optimizer, steps)
    run(split, steps, [0, cut])
    for moment in ("exp_avg", "exp_avg_sq"):
        bits = state_bits(whole, moment)
        assert torch.equal(bits, state_bits(again, moment))
        assert torch.equal(bits, state_bits(split, moment))
        for other in (seed, name):
            assert (bits != state_bits(other, moment)).float().mean() > 0.05


def second_moment_after(rounding: str, beta2: float, values: list[torch.Tensor]) -> torch.Tensor:
    size = values[0].numel()
    optimizer = make([(torch.zeros(size), 0)], rounding=rounding, betas=(0.9, beta2))
    optimizer.allocate_state()
    weight = weights_of(optimizer)[0]
    optimizer.state[weight]["exp_avg_sq"].fill_(1.0)
    run(optimizer, values)
    return optimizer.state[weight]["exp_avg_sq"].float()


def test_a_second_moment_rounded_to_nearest_stalls_where_stochastic_rounding_follows():
    """With beta2 = 0.999 a step's change, 2^-10 of the value, is below half a bf16 step."""
    zeros = [torch.zeros(2000)] * 1000
    assert (second_moment_after("nearest", 0.999, zeros) == 1.0).all()
    followed = second_moment_after("stochastic", 0.999, zeros)
    assert followed.mean() == pytest.approx(0.999 ** 1000, rel=0.02)
    # At the report's beta2 = 0.95 both follow a gradient that vanishes ...
    assert second_moment_after("nearest", 0.95, zeros[:100]).max() < 0.02
    # ... but to a constant gradient of 1.02 rounding to nearest does not rise: 0.05 * 0.04 is below half a bf16 step.
    constant = [torch.full((2000,), 1.02)] * 200
    assert (second_moment_after("nearest", 0.95, constant) == 1.0).all()
    assert second_moment_after("stochastic", 0.95, constant).mean() == pytest.approx(1.02 ** 2, rel=2e-3)


def test_loading_keeps_the_dtypes():
    """Megatron-Core loads an optimizer's own state back into it; torch would make the moments fp32."""
    optimizer = make([(torch.ones(300), 0)], rounding="stochastic")
    run(optimizer, gradients(2, 300))
    before = {moment: state_bits(optimizer, moment).clone() for moment in ("exp_avg", "exp_avg_sq")}
    optimizer.load_state_dict(optimizer.state_dict())
    assert all(torch.equal(state_bits(optimizer, moment), bits) for moment, bits in before.items())
    run(optimizer, gradients(1, 300))
    assert optimizer.state[weights_of(optimizer)[0]]["exp_avg"].dtype == BF16


def test_choices_are_checked():
    with pytest.raises(ConfigError, match="exp_avg_dtype='fp16' must be one of fp32, bf16"):
        preset("tiny").override(exp_avg_dtype="fp16").validate(1)
    with pytest.raises(ConfigError, match="moment_rounding='up' must be one of stochastic, nearest"):
        preset("tiny").override(moment_rounding="up").validate(1)


def test_a_closure_is_refused():
    with pytest.raises(ValueError, match="takes no closure"):
        make([(torch.ones(3), 0)]).step(lambda: 0.0)
