"""How tensors are put into files."""

from __future__ import annotations

from typing import Any

import pytest

from dsv3_megatron.checkpoint.hf.names import hugging_face_tensors
from dsv3_megatron.checkpoint.hf.weight_files import plan_shards
from dsv3_megatron.config.fields import ConfigError
from tests.parity.architectures import variant


def test_files_are_filled_in_order_and_aligned():
    model = variant("plain")
    shards = plan_shards(model, "fp8", max_shard_bytes=5000)
    assert len(shards) > 5
    order = [tensor.name for tensor in hugging_face_tensors(model)]
    position = {name: number for number, name in enumerate(order)}
    last = -1
    for shard in shards:
        names = [entry.name for entry in shard.entries]
        weights = sorted(position[name] for name in names if name in position)
        assert weights == list(range(last + 1, last + 1 + len(weights)))
        last = weights[-1]
        assert {name.removesuffix("_scale_inv") for name in names} == {order[number] for number in weights}
        assert sum(entry.num_bytes for entry in shard.entries) <= 5000 or len(weights) == 1
        for entry in shard.entries:
            assert entry.offset % entry.dtype.itemsize == 0
    assert last == len(order) - 1


@pytest.mark.parametrize(("arguments", "message"), [
    (("fp16",), "dtype='fp16' must be one of bf16, fp8, fp32"), (("bf16", 0), "max_shard_bytes=0 must be at least 1")])
def test_wrong_plans(arguments: tuple[Any, ...], message: str):
    with pytest.raises(ConfigError, match=message):
        plan_shards(variant("plain"), *arguments)
