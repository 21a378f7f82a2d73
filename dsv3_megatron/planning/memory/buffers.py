"""What is always there beside weights, gradients and optimizer: tables and counts."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.config.parallel import ParallelConfig
from dsv3_megatron.config.precision import Fp8Config, linear_shapes, precision_map
from dsv3_megatron.parallel.layout import StageLayout
from dsv3_megatron.planning.memory.settings import INDEX, WIDE, PassSettings
from dsv3_megatron.planning.memory.stage_cost import StageContent


def buffer_bytes(s: PassSettings, contents: Sequence[StageContent]) -> int:
    """Bytes of small buffers on a rank with these stages: rotary tables; routers' biases, loads and balance losses."""
    total = 0
    for content in contents:
        layers = (*content.layers, *content.mtp)
        moe = sum(layer.is_moe for layer in layers)
        total += len(layers) * 2 * s.whole_length * s.rope // 2 * WIDE
        total += moe * (s.experts * (WIDE + INDEX) + WIDE)
    return total


def fp8_weight_bytes(fp8: Fp8Config, model: ModelConfig, parallel: ParallelConfig, stages: Sequence[StageLayout], *,
                     device: str) -> int:
    """Weights in FP8 beside the run's own, from their first use in a step to its end: values and scales of 128x128.

    On CUDA a second copy of the values is turned round for the input gradients' products.
    """
    if not fp8.is_enabled:
        return 0
    return _stages_in_fp8(model, parallel, fp8, tuple(stages), 2 if device == "cuda" else 1)


@functools.lru_cache(maxsize=4096)
def _stages_in_fp8(model: ModelConfig, parallel: ParallelConfig, fp8: Fp8Config, stages: tuple[StageLayout, ...],
                   num_copies: int) -> int:
    decoder, mtp = _fp8_weights(model, parallel, fp8, num_copies)
    return sum(sum(decoder[layer] for layer in stage.layer_ids) + sum(mtp[depth] for depth in stage.mtp_layer_ids)
               for stage in stages)


@functools.lru_cache(maxsize=256)
def _fp8_weights(model: ModelConfig, parallel: ParallelConfig, fp8: Fp8Config, num_copies: int
                 ) -> tuple[list[int], list[int]]:
    """Bytes of each layer and of each MTP module."""
    precisions = precision_map(fp8, model)
    local_experts = model.num_experts // parallel.expert_model_parallel_size
    sizes = {"decoder": [0] * model.num_layers, "mtp": [0] * model.mtp_num_layers}
    for name, (rows, columns) in linear_shapes(model, parallel).items():
        if "fp8" in (precisions[name].fprop, precisions[name].dgrad):
            size = num_copies * rows * columns + -(-rows // 128) * -(-columns // 128) * WIDE
            kind, _, number, *_ = name.split(".")
            sizes[kind][int(number)] += size * (local_experts if ".experts." in name else 1)
    return sizes["decoder"], sizes["mtp"]
