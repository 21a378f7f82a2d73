"""Which tensor of a Hugging Face checkpoint is in which file, in which dtype: planned for a model.

A plan is enough to write every file's header and the index, and to say how large the checkpoint is, before any weight
is read: the inventory of a model of any size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dsv3_megatron.checkpoint.hf.names import HuggingFaceTensor, Storage, hugging_face_tensors
from dsv3_megatron.checkpoint.hf.safetensors_file import NAMES, SINGLE, header_bytes
from dsv3_megatron.checkpoint.hf.spellings import is_fused, parts_of_fused
from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.json_files import parse_json
from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.ops.fp8.published import scale_shape

# DeepSeek-V3 in FP8 comes out in 163 files, as published.
MAX_SHARD_BYTES = 4_250_000_000
DTYPES = ("bf16", "fp8", "fp32")
_PLAIN = {"bf16": torch.bfloat16, "fp8": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class FileEntry:
    """One tensor of a file: its name, dtype and shape, and where its bytes begin."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def num_bytes(self) -> int:
        """Bytes that the tensor's values take."""
        return self.dtype.itemsize * math.prod(self.shape)


@dataclass(frozen=True)
class WeightFile:
    """One file: its name, its first bytes, and the tensors that follow."""

    file: str
    header: bytes
    entries: tuple[FileEntry, ...]

    @property
    def num_bytes(self) -> int:
        """Length of the file."""
        return len(self.header) + sum(entry.num_bytes for entry in self.entries)


def plan_shards(model: ModelConfig, dtype: str, max_shard_bytes: int = MAX_SHARD_BYTES) -> list[WeightFile]:
    """The files of a checkpoint of this model, filled in the order of the forward pass.

    MTP modules come with their copies of embedding and head, as published. A matrix and its scales are in one file.
    Names are those by which `transformers` knows its own files again, and removes them when it saves another model in
    the same folder; the published checkpoint's have six digits at the end.

    Args:
        model: The architecture.
        dtype: "bf16" (router biases FP32), "fp8" (matrices FP8 with FP32 scales, the rest as "bf16") or "fp32".
        max_shard_bytes: A file with more than one tensor has at most so many bytes of tensors.

    Raises:
        ConfigError: max_shard_bytes is not positive, or dtype is not known.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}")
    if max_shard_bytes < 1:
        raise ConfigError(f"max_shard_bytes={max_shard_bytes} must be at least 1")
    contents: list[list[FileEntry]] = []
    filled = 0
    for tensor in hugging_face_tensors(model):
        entries = stored_entries(tensor, dtype)
        size = sum(entry.num_bytes for entry in entries)
        if not contents or filled + size > max_shard_bytes:
            contents.append([])
            filled = 0
        contents[-1] += entries
        filled += size
    if len(contents) == 1:
        return [_shard(SINGLE, contents[0])]
    return [_shard(f"model-{number:05d}-of-{len(contents):05d}.safetensors", entries)
            for number, entries in enumerate(contents, start=1)]


def stored_entries(tensor: HuggingFaceTensor, dtype: str) -> list[FileEntry]:
    """What is stored of one tensor: itself, and its scales where it is FP8."""
    if tensor.storage is Storage.BIAS:
        return [FileEntry(tensor.name, torch.float32, tensor.shape)]
    if tensor.storage is Storage.MATRIX and dtype == "fp8":
        rows, columns = tensor.shape
        return [FileEntry(tensor.name, torch.float8_e4m3fn, tensor.shape),
                FileEntry(tensor.scale_name, torch.float32, scale_shape((rows, columns)))]
    return [FileEntry(tensor.name, _PLAIN[dtype], tensor.shape)]


def shard_from_header(file: str, header: str) -> WeightFile:
    """The plan of a file whose JSON header is known, the same byte for byte.

    The experts of a layer that are one tensor in the file are an entry each: these are the names of the weights.

    Args:
        file: Name of the file.
        header: The header's text, padding included.
    """
    prefix = len(header.encode()).to_bytes(8, "little") + header.encode()
    dtypes = {name: dtype for dtype, name in NAMES.items()}
    entries: list[FileEntry] = []
    for name, value in parse_json(header).items():
        if name == "__metadata__":
            continue
        dtype, shape, offset = dtypes[value["dtype"]], tuple(value["shape"]), len(prefix) + value["data_offsets"][0]
        if is_fused(name):
            entries += [FileEntry(part.name, dtype, part.shape, offset + part.offset_bytes)
                        for part in parts_of_fused(name, shape, dtype)]
        else:
            entries.append(FileEntry(name, dtype, shape, offset))
    return WeightFile(file, prefix, tuple(sorted(entries, key=lambda entry: (entry.offset, entry.num_bytes))))


def index_json(shards: Sequence[WeightFile]) -> dict[str, Any]:
    """Make the content of `model.safetensors.index.json`: the bytes of all tensors, and the file of each."""
    return {"metadata": {"total_size": sum(entry.num_bytes for shard in shards for entry in shard.entries)},
            "weight_map": {entry.name: shard.file for shard in shards for entry in shard.entries}}


def inventory(shards: Sequence[WeightFile]) -> str:
    """A table of dtypes, with the number of tensors and bytes of each, and the totals."""
    lines = [f"{'dtype':<10}{'tensors':>10}{'bytes':>20}"]
    entries = [entry for shard in shards for entry in shard.entries]
    scales = [entry for entry in entries if entry.name.endswith("_scale_inv")]
    weights = [entry for entry in entries if not entry.name.endswith("_scale_inv")]
    groups = [(NAMES[dtype], [entry for entry in weights if entry.dtype == dtype]) for dtype in NAMES]
    for label, group in [*groups, ("scales", scales), ("all", entries)]:
        if group:
            lines.append(f"{label:<10}{len(group):>10,}{sum(entry.num_bytes for entry in group):>20,}")
    files = sum(shard.num_bytes for shard in shards)
    lines.append(f"{len(weights):,} weight tensors in {len(shards)} files of {files:,} bytes with their headers")
    return "\n".join(lines)


def _shard(file: str, entries: list[FileEntry]) -> WeightFile:
    # Wide dtypes first, so that every tensor begins at a multiple of its element's size.
    ordered = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    header, offsets = header_bytes([(entry.name, entry.dtype, entry.shape) for entry in ordered])
    return WeightFile(file, header, tuple(FileEntry(entry.name, entry.dtype, entry.shape, offsets[entry.name])
                                          for entry in ordered))
