"""A checkpoint's index: which part of which tensor is where. Read without running what is in it, and checked.

The index (`.metadata`) is a pickle of torch.distributed.checkpoint's classes. Nothing but these is made of it, and what
it says must lie in the files of its own folder.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from dsv3_megatron.checkpoint.folder import Manifest, damaged
from dsv3_megatron.process.unpickling import UnpicklingError, load_listed

INDEX = ".metadata"
# What reading a damaged file raises: whichever layer meets the damage first.
READ_ERRORS = (CheckpointException, CheckpointingException, OSError, RuntimeError, EOFError, ValueError, KeyError,
               TypeError, AttributeError, IndexError, AssertionError, UnpicklingError, MemoryError)

_METADATA = "torch.distributed.checkpoint.metadata"
_PLANNER = "torch.distributed.checkpoint.planner"
_LISTED = frozenset({
    *((_METADATA, name) for name in (
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
        "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    *((_PLANNER, name) for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    # In indexes of earlier releases of torch and Megatron-Core.
    ("torch.distributed.checkpoint.filesystem", "StorageMeta"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"),
    ("pathlib", "PosixPath"), ("pathlib._local", "PosixPath"),
    ("collections", "OrderedDict"), ("builtins", "set"), ("builtins", "frozenset"),
})


def read_index(manifest: Manifest) -> Metadata:
    """Read a checkpoint's index.

    Raises:
        ValueError: the checkpoint has none, or what it says is not in the checkpoint's files.
        UnpicklingError: the file names something else than an index does.
        OSError: the file cannot be read.
    """
    if INDEX not in manifest.files:
        raise ValueError(f"the manifest names no {INDEX}, which says where its tensors are")
    with open(manifest.path / INDEX, "rb") as stream:
        metadata = load_listed(stream, _is_listed, "index of a checkpoint")
    _check(metadata, manifest)
    if metadata.storage_meta is None:
        metadata.storage_meta = StorageMeta()
    return metadata


def saved_tensors(manifest: Manifest) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a checkpoint, by key.

    Raises:
        DamagedCheckpointError: the checkpoint's index cannot be read.
    """
    try:
        entries = read_index(manifest).state_dict_metadata
    except READ_ERRORS as error:
        raise damaged(manifest.path.parent, manifest.progress.iteration,
                      f"{INDEX}: {type(error).__name__}: {error}") from error
    return {key: tuple(entry.size) for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def _is_listed(module: str, name: str) -> bool:
    return (module, name) in _LISTED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype))


def _check(metadata: Any, manifest: Manifest) -> None:
    """Raise ValueError if an index is not one, or leads out of its files."""
    if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, dict) \
            or not isinstance(metadata.storage_data, dict):
        raise ValueError(f"{INDEX} is no index of a checkpoint")
    for index, place in metadata.storage_data.items():
        name, offset, length = (getattr(place, field, None) for field in ("relative_path", "offset", "length"))
        if not isinstance(index, MetadataIndex) or not isinstance(name, str) or name not in manifest.files:
            raise ValueError(f"{INDEX} places {getattr(index, 'fqn', index)!r} in {name!r}, which is no file of this "
                             "checkpoint")
        if type(offset) is not int or type(length) is not int or offset < 0 or length < 0 \
                or offset + length > manifest.files[name]:
            raise ValueError(f"{INDEX} places {index.fqn!r} at {offset!r} in {name}, {length!r} bytes of "
                             f"{manifest.files[name]}")
        if getattr(place, "transform_descriptors", None):
            raise ValueError(f"{INDEX} says that {index.fqn!r} is stored in another form")
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(key, str) or not isinstance(entry, TensorStorageMetadata | BytesStorageMetadata):
            raise ValueError(f"{INDEX} has an entry {key!r} that is neither a tensor nor bytes")
        if isinstance(entry, TensorStorageMetadata):
            _check_tensor(key, entry)


def _check_tensor(key: str, entry: TensorStorageMetadata) -> None:
    if not isinstance(entry.size, torch.Size) or not isinstance(entry.properties, TensorProperties) \
            or not isinstance(entry.properties.dtype, torch.dtype) or not isinstance(entry.chunks, list):
        raise ValueError(f"{INDEX} does not describe the tensor {key!r}")
    for chunk in entry.chunks:
        if not isinstance(chunk, ChunkStorageMetadata) or len(chunk.sizes) != len(entry.size) \
                or len(chunk.offsets) != len(entry.size) or any(
                    low < 0 or size < 0 or low + size > most
                    for low, size, most in zip(chunk.offsets, chunk.sizes, entry.size, strict=True)):
            raise ValueError(f"{INDEX} has a part of {key!r} that does not lie in it")
