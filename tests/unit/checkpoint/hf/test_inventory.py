"""What DeepSeek-V3's checkpoint holds: by arithmetic, and by the modules built on the meta device."""

from __future__ import annotations

from collections import Counter

import torch

from dsv3_megatron.checkpoint.hf.weight_files import index_json, inventory, plan_shards
from dsv3_megatron.config.presets import preset

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
