"""Tensors of a Hugging Face folder that are the model's under another name, or no part of it.

`transformers` 5 can write the experts of a layer in two tensors, as it holds them:

    mlp.experts.gate_up_proj    [E, 2F, H], gate above up in each expert
    mlp.experts.down_proj       [E, H, F]

A part of such a tensor that belongs to one expert lies in one piece, so it is read, and written, as the tensor of the
published name at that place of the file. Older programs store the rotary embedding's frequencies, which follow from
`config.json`, and are compared with it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

import torch

from dsv3_megatron.checkpoint.folder import CheckpointError
from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.ops.rotary_frequencies import plain_frequencies, yarn_frequencies

_FUSED = re.compile(r"(.+\.mlp\.experts)\.(gate_up_proj|down_proj)(_scale_inv)?")
_FREQUENCIES = re.compile(r"(.+\.)?rotary_emb\.(original_)?inv_freq")
# Frequencies in fp32 differ by the rounding of a power; in narrower types by that of the type.
_FREQUENCY_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


@dataclasses.dataclass(frozen=True)
class ExpertSlice:
    """The tensor of one expert inside a fused one.

    Attributes:
        name: Published name of the expert's tensor.
        shape: Lengths of the axes of the expert's tensor.
        offset_bytes: First byte within the fused tensor.
    """

    name: str
    shape: tuple[int, ...]
    offset_bytes: int


def is_frequencies(name: str) -> bool:
    """Whether a tensor holds the rotary embedding's frequencies."""
    return _FREQUENCIES.fullmatch(name) is not None


def is_fused(name: str) -> bool:
    """Whether a tensor holds a projection of all experts of a layer, or the block scales of one."""
    return _FUSED.fullmatch(name) is not None


def parts_of_fused(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[ExpertSlice]:
    """The experts' tensors in a fused one, in the order of their bytes.

    Args:
        name: Name of the fused tensor, for which `is_fused` holds.
        shape: Lengths of the axes of the fused tensor.
        dtype: Dtype of the fused tensor.

    Raises:
        ValueError: the tensor has not three dimensions, or rows that do not divide into gate and up.
    """
    match = _FUSED.fullmatch(name)
    assert match is not None
    prefix, kind, scale = match.groups()
    projections = _PARTS[kind]
    if len(shape) != 3 or shape[1] % len(projections):
        raise ValueError(f"{name} has shape {list(shape)}; all experts' {' on '.join(projections)} of a layer are "
                         "[experts, rows, columns]" + (" with an even number of rows" if len(projections) > 1 else ""))
    experts, rows, columns = shape
    part = (rows // len(projections), columns)
    num_bytes, offset = dtype.itemsize * math.prod(part), 0
    for expert in range(experts):
        for projection in projections:
            yield ExpertSlice(f"{prefix}.{expert}.{projection}.weight{scale or ''}", part, offset)
            offset += num_bytes


def check_stored_frequencies(model: ModelConfig, name: str, stored: torch.Tensor) -> None:
    """Compare frequencies that a checkpoint stores with those that its `config.json` makes; nothing reads them.

    Args:
        model: The architecture of the `config.json`.
        name: Name of the tensor, with its file, for the message.
        stored: Radians per token of each pair, [qk_rope_head_dim / 2]. Under YaRN those before the extension are as
            good: some programs store these.

    Raises:
        CheckpointError: the frequencies are others: the weights were trained with another rotary embedding.
    """
    tolerance = _FREQUENCY_TOLERANCE[stored.dtype]
    expected = [plain_frequencies(model.qk_rope_head_dim, model.rotary_base)]
    if model.rope_type == "yarn":
        expected.insert(0, yarn_frequencies(
            model.qk_rope_head_dim, model.rotary_base, factor=model.rotary_scaling_factor,
            original_length=model.original_max_position_embeddings, beta_fast=model.beta_fast,
            beta_slow=model.beta_slow))
    candidates = [values for values in expected if values.shape == stored.shape]
    if any(torch.allclose(stored.double(), values, rtol=tolerance, atol=0.0) for values in candidates):
        return
    raise CheckpointError(
        f"{name} holds {_some(stored)} radians per token, config.json makes {_some(expected[0])}: the weights were "
        "trained with another rotary embedding than it says; give it their rope_theta and rope_scaling")


def _some(values: torch.Tensor) -> str:
    shown = ", ".join(f"{value:.6g}" for value in values.flatten()[:4].tolist())
    return f"[{shown}{', ...' if values.numel() > 4 else ''}]"
