"""AdamW in one launch, under Triton's interpreter, against the update block by block."""

from __future__ import annotations

import pytest
import torch

from dsv3_megatron.optim.adamw import NarrowMomentAdamW
from dsv3_megatron.optim.rounding import BLOCK
from dsv3_megatron.optim.shards import Named, ParameterShard
from tests.unit.optim.gradients import BF16, FP32, gradients

# Of parameter and elements: a weight that begins inside a block and reaches into the next, one of two experts, one of
# a single element.
PIECES = (((("a", BLOCK - 700, 3000),)), (("b", 0, 500), ("c", 0, 641)), (("d", 5, 1),))


def make(is_fused: bool, rounding: str, dtypes: tuple[torch.dtype, torch.dtype]) -> NarrowMomentAdamW:
    shards = []
    for seed, parts in enumerate(PIECES):
        names, start = [], 0
        for name, first, count in parts:
            names.append(Named(name, start, start + count, first))
            start += count
        values = torch.randn(start, generator=torch.Generator().manual_seed(seed))
        weight = torch.nn.Parameter(values)
        shards.append(ParameterShard(weight, weight, 0, start, None, tuple(names)))
    weights = [shard.master for shard in shards]
    groups = torch.optim.AdamW(
        [{"params": weights[:2], "weight_decay": 0.1}, {"params": weights[2:], "weight_decay": 0.0}], lr=1e-2,
        betas=(0.9, 0.95), eps=1e-8).param_groups
    return NarrowMomentAdamW(groups, shards, exp_avg_dtype=dtypes[0], exp_avg_sq_dtype=dtypes[1],
                             is_stochastic=rounding == "stochastic", seed=7, is_fused=is_fused)


def weights_of(optimizer: NarrowMomentAdamW) -> list[torch.Tensor]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtypes", [(BF16, BF16), (FP32, BF16), (BF16, FP32)], ids=str)
def test_it_is_the_update_block_by_block(rounding, dtypes):
    ours, theirs = (make(is_fused, rounding, dtypes) for is_fused in (True, False))
    for step in range(3):
        for ours_weight, weight in zip(weights_of(ours), weights_of(theirs), strict=True):
            # A step compared by itself: rounding may take another neighbour, which later steps would carry on.
            ours_weight.data.copy_(weight.data)
            for name in ("exp_avg", "exp_avg_sq"):
                if theirs.state[weight]:
                    ours.state[ours_weight][name].copy_(theirs.state[weight][name])
            weight.grad = gradients(step + 1, weight.numel(), scale=1e-3)[-1]
            ours_weight.grad = weight.grad.clone()
        for optimizer in (ours, theirs):
            optimizer.step()
        for ours_weight, weight in zip(weights_of(ours), weights_of(theirs), strict=True):
            # fp32 with a few roundings in another order, of an update of about lr = 1e-2.
            torch.testing.assert_close(ours_weight, weight, rtol=2e-7, atol=2e-8)
            assert ours.state[ours_weight]["step"] == theirs.state[weight]["step"] == step + 1
            for name, dtype in zip(("exp_avg", "exp_avg_sq"), dtypes, strict=True):
                # A sum that nearly cancels is off by the last bits of its parts, g of 1e-3 and g^2 of 1e-6.
                off = {"exp_avg": 1e-10, "exp_avg_sq": 1e-13}[name]
                mine, other = ours.state[ours_weight][name], theirs.state[weight][name]
                assert mine.dtype == dtype
                if dtype == FP32:
                    torch.testing.assert_close(mine, other, rtol=3e-7, atol=off)
                else:
                    # The same bits but where an fp32 result's last bits decide: 2^-24 of 2^-9, a few in 10,000.
                    torch.testing.assert_close(mine.float(), other.float(), rtol=2**-7, atol=off)
                    assert (mine != other).float().mean() < 2e-3 or (mine != other).sum() <= 1


def test_nothing_beside_a_piece_is_touched_and_what_is_not_finite_stays_so():
    optimizer = make(True, "stochastic", (BF16, BF16))
    weight = weights_of(optimizer)[0]
    around = torch.full((weight.numel() + 64,), 3.0)
    weight.data = around[32:-32]
    for each in weights_of(optimizer):
        each.grad = torch.ones_like(each)
    weight.grad[5] = float("nan")
    weight.grad[6] = float("inf")
    optimizer.step()
    assert (around[:32] == 3.0).all() and (around[-32:] == 3.0).all() and not (around[32:-32] == 3.0).any()
    state = optimizer.state[weight]
    assert weight[5].isnan() and state["exp_avg"][5].isnan() and state["exp_avg_sq"][5].isnan()
    assert state["exp_avg"][6].isinf() and weight[7:].isfinite().all() and state["exp_avg"][7:].isfinite().all()


def test_a_group_is_one_launch_and_a_moved_gradient_is_found(monkeypatch):
    from dsv3_megatron.kernels import weight_update

    optimizer, launches = make(True, "stochastic", (BF16, BF16)), []
    original = weight_update.update_pieces
    monkeypatch.setattr(weight_update, "update_pieces",
                        lambda *given, **named: (launches.append(given[0]), original(*given, **named)))
    for weight in weights_of(optimizer):
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    optimizer.step()
    assert len(launches) == 4 and launches[0] is launches[2], "a launch a group, the table kept"
    before = weights_of(optimizer)[0].detach().clone()
    weights_of(optimizer)[0].grad = torch.zeros_like(before)
    optimizer.step()
    assert launches[4] is not launches[2]
    assert not torch.equal(weights_of(optimizer)[0], before), "momentum goes on"


def test_a_gradient_in_bf16_is_refused():
    optimizer = make(True, "nearest", (BF16, BF16))
    for weight in weights_of(optimizer):
        weight.grad = torch.ones_like(weight)
    operands = optimizer._operands(weights_of(optimizer)[0])
    narrow = type(operands)(operands.weight, operands.gradient.bfloat16(), operands.moments)
    group = {**optimizer.param_groups[0], "step": 1}
    with pytest.raises(ValueError, match="a gradient is torch.bfloat16: this update takes float32"):
        optimizer._fused.update(0, [narrow], group)
