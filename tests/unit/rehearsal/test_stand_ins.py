"""Replacements that answer for a GPU, each by what it is asked."""

from __future__ import annotations

import torch

from dsv3_megatron.rehearsal.known_values import MAX_NUMBERS
from dsv3_megatron.rehearsal.replacement import replaced
from dsv3_megatron.rehearsal.stand_ins import GroupCount, replacements
from dsv3_megatron.rehearsal.watch import Watch, fake_mode

GPU = torch.device("cuda", 0)


def test_all_numbers_of_a_tensor_are_read_at_once_however_many() -> None:
    watch = Watch()
    table = tuple(item for item in replacements(watch, GroupCount(), rank=0, world_size=1, imbalance=1.0)
                  if item.name == "tolist")
    with replaced(table), fake_mode(), watch:
        many = torch.empty(MAX_NUMBERS + 1, dtype=torch.float64, device=GPU)
        assert many.tolist() == [1.0] * (MAX_NUMBERS + 1)
        assert (torch.tensor([3, 1]).to(GPU) + 1).tolist() == [4, 2]
    assert sorted(watch.now.waits.values()) == [1, 2], "a copy to the device and two reads"
