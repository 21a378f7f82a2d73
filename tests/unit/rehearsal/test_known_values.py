"""Values that follow fake tensors equal those of the same operations on real ones, and are forgotten when they must be.

The fake tensors are of a GPU, which need not be here.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dsv3_megatron.rehearsal.known_values import MAX_NUMBERS, forget, known
from dsv3_megatron.rehearsal.watch import UnknownSize, Watch, fake_mode

GPU = torch.device("cuda", 0)


@pytest.fixture
def watch() -> Iterator[Watch]:
    with fake_mode(), Watch() as watch:
        yield watch


def test_what_is_copied_and_computed_is_known(watch: Watch) -> None:
    numbers = torch.tensor([[3, 1, 2], [0, 5, 4]]).to(GPU)
    assert numbers.device == GPU
    counts = (numbers.t().contiguous() + 1).sum(dim=1)
    assert known(counts).tolist() == [5, 8, 8]
    assert counts.cpu().tolist() == [5, 8, 8] and int(counts[1]) == 8
    assert known(numbers.argsort(dim=1)).tolist() == [[1, 2, 0], [0, 2, 1]]


def test_zeros_are_known_whatever_they_are_like(watch: Watch) -> None:
    unknown = torch.empty(2, 3, device=GPU)
    mask = torch.zeros_like(unknown, dtype=torch.bool).scatter_(1, torch.tensor([[0, 2], [1, 2]]).to(GPU), True)
    assert known(unknown) is None
    assert known(mask.sum(dim=0)).tolist() == [1, 1, 2]
    assert len(unknown[mask]) == 4 and torch.nonzero(mask).shape == (4, 2)
    assert unknown.masked_select(mask).shape == (4,)


def test_an_unknown_write_is_seen_through_every_view(watch: Watch) -> None:
    zeros = torch.zeros(4, dtype=torch.int64, device=GPU)
    view = zeros[:2]
    view.add_(2)
    assert known(zeros).tolist() == [2, 2, 0, 0]
    view.add_(torch.empty(2, dtype=torch.int64, device=GPU))
    assert known(zeros) is None and known(view) is None
    zeros.zero_()
    assert known(zeros).tolist() == [0] * 4 and known(view) is None


def test_a_view_made_before_the_values_knows_and_forgets_them(watch: Watch) -> None:
    buffer = torch.empty(4, dtype=torch.int64, device=GPU)
    view = buffer.view(2, 2)
    buffer.fill_(7)
    assert known(buffer).tolist() == [7] * 4
    view.add_(1)
    assert known(buffer).tolist() == [8] * 4 and known(view).tolist() == [[8, 8], [8, 8]]
    view.add_(torch.empty(2, 2, dtype=torch.int64, device=GPU))
    assert known(buffer) is None and known(view) is None
    buffer.fill_(1)
    forget(buffer)
    assert known(buffer) is None


def test_large_and_random_tensors_are_not_known(watch: Watch) -> None:
    assert known(torch.zeros(MAX_NUMBERS + 1, device=GPU)) is None
    assert known(torch.rand(3, device=GPU)) is None


def test_unknown_numbers_read_as_one_and_each_read_is_noted(watch: Watch) -> None:
    unknown = torch.empty(3, device=GPU)
    assert float(unknown.sum()) == 1.0 and unknown.cpu().tolist() == [1.0] * 3
    assert sorted(what for what, _ in watch.now.waits) == ["a copy device to host", "a number is read"]
    assert {what: count for (what, _), count in watch.now.assumed.items()} == {
        "a copy device to host": 3, "a number is read": 1}
    unknown.to("cpu", non_blocking=True)
    assert watch.now.copies.total() == 1 and watch.now.waits.total() == 2
    assert torch.zeros(2, device=GPU).cpu().tolist() == [0, 0] and watch.now.assumed.total() == 7


def test_a_size_that_nobody_knows_is_an_error(watch: Watch) -> None:
    with pytest.raises(UnknownSize, match="masked_select gives depends on a mask"):
        torch.empty(3, device=GPU).masked_select(torch.empty(3, dtype=torch.bool, device=GPU))


def test_tensors_of_the_host_stay_real(watch: Watch) -> None:
    real = torch.arange(5)
    assert type(real) is torch.Tensor and real.numpy().sum() == 10
    assert type(real * 2) is torch.Tensor and (real * 2).tolist() == [0, 2, 4, 6, 8]


def test_what_fills_a_memory_is_known_by_every_view_of_all_of_it(watch: Watch) -> None:
    table = torch.empty(2, 3, dtype=torch.int64, device=GPU)
    table.view(-1).copy_(torch.tensor([3, 1, 2, 0, 5, 4]))
    assert known(table).tolist() == [[3, 1, 2], [0, 5, 4]] and table.cpu().sum(1).tolist() == [6, 9]
    table.view(-1)[:2].copy_(torch.empty(2, dtype=torch.int64, device=GPU))
    assert known(table) is None
