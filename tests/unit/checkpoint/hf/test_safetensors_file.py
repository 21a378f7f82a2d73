"""The header of a safetensors file."""

from __future__ import annotations

import torch

from dsv3_megatron.checkpoint.hf.safetensors_file import header_bytes
from dsv3_megatron.checkpoint.hf.weight_files import shard_from_header


def test_a_header_is_planned_again_byte_for_byte():
    header, positions = header_bytes([("a", torch.float32, (2, 3)), ("é", torch.bfloat16, (5,))])
    shard = shard_from_header("x", header[8:].decode())
    assert shard.header == header
    assert {entry.name: entry.offset for entry in shard.entries} == positions
