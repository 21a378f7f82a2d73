"""Results made by their description are those that torch gives: shape, strides, place in memory, dtype and device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3_megatron.rehearsal.known_values import known
from dsv3_megatron.rehearsal.remembered_results import slice_result
from dsv3_megatron.rehearsal.watch import Watch, fake_mode

GPU = torch.device("cuda", 0)
BOUND = st.none() | st.integers(-12, 12)


def place(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.device.type


@pytest.mark.parametrize("work", [
    lambda x: x * 2, lambda x: x.t(), lambda x: x[1:, ::2], lambda x: x.view(-1).split([5, 10, 9]),
    lambda x: x.topk(2, dim=1), lambda x: x.bfloat16() @ x.t().bfloat16(), lambda x: x.sum(dim=0, keepdim=True),
    lambda x: x.index_select(0, torch.tensor([2, 0]).to(x.device)), lambda x: x.expand(2, 4, 6),
    lambda x: x.t().contiguous(),
    lambda x: torch.nn.functional.pad(x, (1, 2)), lambda x: torch.cat([x, x.flip(0)]), lambda x: x.unbind(1),
    lambda x: torch.nn.functional.silu(x), lambda x: x.sort(dim=1), lambda x: x.half().unsqueeze(1).squeeze(1),
])
def test_a_second_result_is_the_real_ones_shape_and_place(work: Any) -> None:
    real = work(torch.rand(4, 6))
    with fake_mode(), Watch() as watch:
        x = torch.empty(4, 6, device=GPU)
        def give() -> Any:
            return work(x)

        first = give()
        before = watch.results.hits
        second = give()
        assert watch.results.hits > before
    as_list = [[part] if isinstance(part, torch.Tensor) else list(part) for part in (real, first, second)]
    for wanted, one, other in zip(*as_list, strict=True):
        assert place(one) == place(other) == (*place(wanted)[:-1], "cuda")
        shares = [part.untyped_storage()._cdata == x.untyped_storage()._cdata for part in (one, other)]
        assert shares[0] == shares[1], "a view is one again"
        assert one.untyped_storage().nbytes() == other.untyped_storage().nbytes()


@given(BOUND, BOUND, st.integers(1, 4), st.integers(-2, 1))
def test_a_slice_is_computed_as_torch_does(start: int | None, end: int | None, step: int, dim: int) -> None:
    real = torch.arange(60).view(6, 10)[:, 1:]
    (part,) = slice_result(real, dim, start, end, step).parts
    wanted = torch.ops.aten.slice.Tensor(real, dim, start, end, step)
    offset = wanted.storage_offset() - real.storage_offset()
    assert (part.shape, part.strides, part.offset) == (tuple(wanted.shape), wanted.stride(), offset)


@pytest.mark.parametrize("work", [
    lambda x: x.view(torch.int32), lambda x: x.view(torch.int16), lambda x: x.as_strided((2, 2), (1, 2)),
    lambda x: x.view(2, 2)[1:], lambda x: x.t(), lambda x: x + 1, lambda x: x.narrow(0, 1, 2)])
def test_a_view_begins_where_it_does_whatever_its_operand_begins_at(work: Any) -> None:
    whole = torch.rand(16)
    with fake_mode(), Watch():
        fake = torch.empty(16, device=GPU)
        found = [place(work(fake[start:start + 4]))[:-1] for start in (4, 8, 0)]
    assert found == [place(work(whole[start:start + 4]))[:-1] for start in (4, 8, 0)]


def test_what_a_shape_follows_from_makes_another_result() -> None:
    with fake_mode(), Watch() as watch:
        x = torch.empty(4, 6, device=GPU)
        assert [tuple(x.sum(dim=dim).shape) for dim in (0, 1, 0)] == [(6,), (4,), (6,)]
        assert (x + 1).dtype == torch.float32 and (x.int() + 1).dtype == torch.int32
        assert (x.int() + 1.0).dtype == torch.float32 and (x.int() + True).dtype == torch.int32
        hits = watch.results.hits
        x.mul_(0.25)
        x.mul_(0.5)
        assert watch.results.hits == hits + 1, "a number to compute with is not part of it"


def test_values_follow_remembered_results_and_memory_is_counted_for_each() -> None:
    with fake_mode(), Watch() as watch:
        sums = [torch.tensor([number, 2]).to(GPU) + 1 for number in (3, 8)]
        assert [known(part).tolist() for part in sums] == [[4, 3], [9, 3]]
        x = torch.empty(256, device=GPU)
        start = watch.memory.total_at(watch.memory.now)
        kept = [x + 1 for _ in range(3)]
        assert watch.memory.total_at(watch.memory.now) == start + 3 * 1024 and len(kept) == 3
        sums[0].copy_(torch.empty(2, device=GPU))
        sums[0].copy_(torch.empty(2, device=GPU))
        assert known(sums[0]) is None and known(sums[1]) is not None
