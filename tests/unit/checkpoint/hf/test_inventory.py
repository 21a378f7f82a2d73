"""What DeepSeek-V3's checkpoint holds: by arithmetic, and by the modules built on the meta device."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dsv3_megatron.checkpoint.hf.names import hugging_face_tensors, tensors_by_parameter
from dsv3_megatron.checkpoint.hf.safetensors_file import header_bytes
from dsv3_megatron.checkpoint.hf.weight_files import index_json, inventory, plan_shards, shard_from_header
from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.parallel import ParallelConfig
from dsv3_megatron.config.presets import preset
from dsv3_megatron.model.global_names import whole_parameters
from tests.parity.architectures import variant
from tests.reference_weights import weight_shapes
from tests.unit.model.test_counts import build_without_memory, megatron_core, one_of

__all__ = ["megatron_core"]  # a fixture

V3 = preset("dsv3-671b")
# By hand from the architecture: 61 + 1 layers of which 3 dense; widths 7168, 18432, 2048; 256 experts.
ATTENTION_MATRICES = [(1536, 7168), (24576, 1536), (576, 7168), (32768, 512), (7168, 16384)]
EXPERT_MATRICES = [(2048, 7168), (2048, 7168), (7168, 2048)]
DENSE_MATRICES = [(18432, 7168), (18432, 7168), (7168, 18432)]
MATRICES = Counter(ATTENTION_MATRICES * 62 + EXPERT_MATRICES * 257 * 59 + DENSE_MATRICES * 3)
PLAIN = Counter([(7168,)] * (2 * 62 + 1 + 3) + [(1536,)] * 62 + [(512,)] * 62 + [(256, 7168)] * 59
                + [(129280, 7168)] * 4 + [(7168, 14336)])


def blocks(shape: tuple[int, int]) -> tuple[int, int]:
    return (shape[0] + 127) // 128, (shape[1] + 127) // 128


def test_every_tensor_of_dsv3_671b_in_163_files():
    shards = plan_shards(V3.model, "fp8")
    entries = [entry for shard in shards for entry in shard.entries]
    weights = [entry for entry in entries if not entry.name.endswith("_scale_inv")]
    scales = {entry.name: entry for entry in entries if entry.name.endswith("_scale_inv")}
    assert len(weights) == 46_183 == len({entry.name for entry in weights})
    assert [shard.file for shard in shards] == [f"model-{n:05d}-of-00163.safetensors" for n in range(1, 164)]

    by_dtype = {dtype: Counter(entry.shape for entry in weights if entry.dtype == dtype)
                for dtype in (torch.float8_e4m3fn, torch.bfloat16, torch.float32)}
    assert by_dtype[torch.float8_e4m3fn] == MATRICES and MATRICES.total() == 45_808
    assert by_dtype[torch.bfloat16] == PLAIN
    assert by_dtype[torch.float32] == Counter([(256,)] * 59)
    assert {entry.name for entry in weights if entry.dtype == torch.float32} == {
        f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in range(3, 62)}
    for entry in weights:
        assert (entry.dtype == torch.float8_e4m3fn) == (entry.name + "_scale_inv" in scales)
    assert Counter(scale.shape for scale in scales.values()) == _scale_shapes()
    assert {scale.dtype for scale in scales.values()} == {torch.float32}

    # Main model, MTP module, its copies of embedding and head; and 59 x 256 biases.
    num_parameters = 671_026_404_352 + 11_610_067_968 + 2 * 129_280 * 7168
    num_matrix = sum(rows * columns * count for (rows, columns), count in MATRICES.items())
    total = num_matrix + 4 * sum(r * c * n for (r, c), n in _scale_shapes().items()) \
        + 2 * (num_parameters - num_matrix) + 4 * 59 * 256
    index = index_json(shards)
    assert index["metadata"]["total_size"] == total == 688_574_839_360
    assert len(index["weight_map"]) == 46_183 + 45_808
    assert "46,183 weight tensors in 163 files of 688,586,379,952 bytes" in inventory(shards)


def _scale_shapes() -> Counter[tuple[int, int]]:
    shapes: Counter[tuple[int, int]] = Counter()
    for shape, count in MATRICES.items():
        shapes[blocks(shape)] += count
    return shapes


def test_names_are_the_published_ones():
    """Against the tests' own list, which has no copies."""
    expected = set(weight_shapes(V3.model)) | {"model.layers.61.embed_tokens.weight",
                                               "model.layers.61.shared_head.head.weight"}
    assert {tensor.name for tensor in hugging_face_tensors(V3.model)} == expected


@pytest.fixture
def whole_model(megatron_core: None) -> Iterator[dict[str, tuple[int, ...]]]:
    """Every parameter and router bias of dsv3-671b as one process would hold it, built without memory."""
    run = dataclasses.replace(V3, parallel=ParallelConfig())
    with one_of(1, 0, run.parallel) as groups:
        (stage,) = build_without_memory(run, groups)
        shapes = {whole.name: whole.shape for whole in whole_parameters(stage, groups)}
    shapes |= {name: tuple(buffer.shape) for name, buffer in stage.named_buffers() if name.endswith("expert_bias")}
    yield shapes


def test_the_modules_are_the_inventory(whole_model: dict[str, tuple[int, ...]]):
    """Built on the meta device: each parameter is the tensors that are listed for it, and there is no other."""
    parts = tensors_by_parameter(V3.model)
    assert parts.keys() == whole_model.keys()
    for name, shape in whole_model.items():
        assert (sum(part.shape[0] for part in parts[name]), *parts[name][0].shape[1:]) == shape, name


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


def test_a_header_is_planned_again_byte_for_byte():
    header, positions = header_bytes([("a", torch.float32, (2, 3)), ("é", torch.bfloat16, (5,))])
    shard = shard_from_header("x", header[8:].decode())
    assert shard.header == header
    assert {entry.name: entry.offset for entry in shard.entries} == positions


@pytest.mark.parametrize(("arguments", "message"), [
    (("fp16",), "dtype='fp16' must be one of bf16, fp8, fp32"), (("bf16", 0), "max_shard_bytes=0 must be at least 1")])
def test_wrong_plans(arguments: tuple[Any, ...], message: str):
    with pytest.raises(ConfigError, match=message):
        plan_shards(variant("plain"), *arguments)
