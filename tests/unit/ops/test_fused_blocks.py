"""Which way blocks are attended to; what the ways compute is in test_block_attention.py."""

from __future__ import annotations

import pytest
import torch

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.ops.block_attention import BlockAttention
from dsv3_megatron.ops.fused_blocks import FusedBlockAttention, block_attention, choose_block_attention


@pytest.mark.parametrize(("setting", "device", "value_bytes", "chosen"), [
    ("auto", "cuda", 2, "flash"), ("flash", "cuda", 2, "flash"), ("local", "cuda", 2, "local"),
    ("auto", "cuda", 4, "local"), ("auto", "cpu", 2, "local"), ("local", "cpu", 4, "local")])
def test_the_kernel_is_taken_where_it_can_be(setting: str, device: str, value_bytes: int, chosen: str) -> None:
    backend, _reason = choose_block_attention(setting, device, value_bytes, 192)
    assert backend == chosen
    kind = FusedBlockAttention if chosen == "flash" else BlockAttention
    assert isinstance(block_attention(backend, torch.zeros(1, 1, 1, 4), 2, 1.0), kind)


def test_it_is_missed_where_it_was_asked_for() -> None:
    with pytest.raises(ConfigError, match="attention_backend=flash cannot attend to blocks of other ranks here: no "
                                          "CUDA, fp32; leave it at auto"):
        choose_block_attention("flash", "cpu", 4, 192)
    assert choose_block_attention("auto", "cuda", 2, 320) == ("local", "heads wider than 256")
