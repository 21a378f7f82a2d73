"""Tensors of a Hugging Face folder that are the model's under another name, or no part of it.

`transformers` 5 can write the experts of a layer in two tensors, as it holds them:

    mlp.experts.gate_up_proj    [E, 2F, H], gate above up in each expert
    mlp.experts.down_proj       [E, H, F]

A part of such a tensor that belongs to one expert lies in one piece, so it is read, and written, as the tensor of the
published name at that place of the file. Older programs store the rotary embedding's frequencies, which follow from
`config.json`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

import torch

_FUSED = re.compile(r"(.+\.mlp\.experts)\.(gate_up_proj|down_proj)(_scale_inv)?")
_FREQUENCIES = re.compile(r"(.+\.)?rotary_emb\.(original_)?inv_freq")
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
