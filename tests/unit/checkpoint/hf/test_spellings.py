"""Fused experts as the tensors of one expert each, against torch's own slices; names that are no part of the model."""

import pytest
import torch

from dsv3_megatron.checkpoint.hf.spellings import is_frequencies, is_fused, parts_of_fused

PREFIX = "model.layers.3.mlp.experts"


@pytest.mark.parametrize(("kind", "rows"), [("gate_up_proj", {"gate_proj": slice(0, 3), "up_proj": slice(3, 6)}),
                                            ("down_proj", {"down_proj": slice(0, 6)})])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_are_the_bytes_of_each_expert(kind, rows, dtype):
    fused = torch.arange(2 * 6 * 5).reshape(2, 6, 5).to(dtype)
    content = bytes(fused.view(torch.uint8).flatten().tolist())
    expected = {f"{PREFIX}.{expert}.{name}.weight": fused[expert, place] for expert in range(2)
                for name, place in rows.items()}
    parts = list(parts_of_fused(f"{PREFIX}.{kind}", (2, 6, 5), dtype))
    assert [part.name for part in parts] == list(expected)
    for part in parts:
        tensor = expected[part.name]
        assert part.shape == tuple(tensor.shape)
        size = tensor.numel() * dtype.itemsize
        stored = torch.frombuffer(bytearray(content[part.offset_bytes:part.offset_bytes + size]), dtype=dtype)
        assert torch.equal(stored.view(part.shape), tensor)


def test_block_scales_are_named_as_the_published_ones():
    names = [part.name for part in parts_of_fused(f"{PREFIX}.gate_up_proj_scale_inv", (1, 4, 2), torch.float32)]
    assert names == [f"{PREFIX}.0.gate_proj.weight_scale_inv", f"{PREFIX}.0.up_proj.weight_scale_inv"]


@pytest.mark.parametrize(("kind", "shape", "message"), [
    ("gate_up_proj", (2, 5, 3), r"has shape \[2, 5, 3\]; all experts' gate_proj on up_proj .* even number of rows"),
    ("down_proj", (2, 5), r"has shape \[2, 5\]; all experts' down_proj of a layer are \[experts, rows, columns\]$")])
def test_shapes_that_cannot_be(kind, shape, message):
    with pytest.raises(ValueError, match=message):
        list(parts_of_fused(f"{PREFIX}.{kind}", shape, torch.float32))


@pytest.mark.parametrize(("name", "expected"), [
    (f"{PREFIX}.gate_up_proj", "fused"), (f"{PREFIX}.down_proj_scale_inv", "fused"),
    (f"{PREFIX}.0.gate_proj.weight", ""), ("model.layers.3.mlp.down_proj", ""),
    ("model.layers.0.self_attn.rotary_emb.inv_freq", "frequencies"),
    ("model.rotary_emb.original_inv_freq", "frequencies"), ("rotary_emb.inv_freq", "frequencies"),
    ("model.embed_tokens.weight", "")])
def test_what_a_name_is(name, expected):
    assert (is_fused(name), is_frequencies(name)) == (expected == "fused", expected == "frequencies")
