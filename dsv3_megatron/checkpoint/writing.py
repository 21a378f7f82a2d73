"""A rank's part of a save: planned with all ranks, written with checksums, put together.

The plan is Megatron-Core's and the bytes are torch.distributed.checkpoint's. In between this module has its own steps:

    plan_shards                   all ranks: who writes what, under which names
    ShardsToWrite.write           this rank: its file, and the checksums of it
    ShardsToWrite.write_behind    the same, while training goes on: a copy of its tensors, which a process writes
    gather_outcomes               all ranks: what was written where, or what went wrong
    ShardsToWrite.finish          rank 0: the index
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, SerializationFormat, _StorageInfo, _write_item
from torch.distributed.checkpoint.planner import WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from dsv3_megatron.checkpoint.agreement import why
from dsv3_megatron.checkpoint.background import BackgroundWriter
from dsv3_megatron.checkpoint.host_image import HostImage
from dsv3_megatron.checkpoint.tensor_frames import frame_of, without_crc32
from dsv3_megatron.data.checksums import ChecksumStream, FileChecksums


@dataclass(frozen=True)
class ShardOutcome:
    """What became of one rank's part of a save.

    Attributes:
        results: What torch.distributed.checkpoint puts into its index.
        checksums: Checksums of the files written, by name.
        reason: What went wrong; None: nothing.
    """

    results: list[Any] = field(default_factory=list)
    checksums: dict[str, FileChecksums] = field(default_factory=dict)
    reason: str | None = None


class _ShardWriter(FileSystemWriterAsync):
    """Megatron-Core's writer, which keeps what is to be written as it is: this module writes it."""

    def prepare_write_data(self, plan: Any, planner: Any) -> None:
        self.file_name = f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}"
        self.objects = [(item, planner.resolve_data(item)) for item in plan.items if item.type == WriteItemType.BYTE_IO]
        self.tensors = [(item, planner.resolve_data(item).detach()) for item in plan.items
                        if item.type != WriteItemType.BYTE_IO]


class ShardsToWrite:
    """One rank's part of one save, planned.

    Args:
        writer: Megatron-Core's writer, planned.
        metadata: The index without places; on rank 0.
    """

    def __init__(self, writer: _ShardWriter, metadata: Any) -> None:
        self._writer, self._metadata = writer, metadata
        self.finalize_fns: list[Any] = []  # Megatron-Core appends what writes metadata.json; it is written in `finish`

    @property
    def num_bytes(self) -> int:
        """Bytes of this rank's file."""
        return sum(lengths_of(self._writer.objects, self._writer.tensors))

    def write(self) -> ShardOutcome:
        """Write this rank's file, and have it on disk; what goes wrong is in the outcome, nothing is raised."""
        writer = self._writer
        if not writer.objects and not writer.tensors:
            return ShardOutcome()

        def write() -> ShardOutcome:
            results, checksums = write_shard_file(self._path, writer.objects, writer.tensors, writer.transforms)
            return ShardOutcome(results, {writer.file_name: checksums})

        return _outcome_of(write)

    def write_behind(self, background: BackgroundWriter) -> Future[ShardOutcome]:
        """Keep this rank's file in memory as it is now, and have it on disk later; as `write`, nothing is raised.

        Args:
            background: Prepared for `num_bytes`.

        Returns:
            The outcome to come. Tensors may change as soon as this returns.
        """
        writer = self._writer
        if not writer.objects and not writer.tensors:
            return background.run(ShardOutcome)
        results: list[Any] = []

        def keep() -> ShardOutcome:
            results.extend(put_entries(background.image, writer.file_name, writer.objects, writer.tensors))
            return ShardOutcome()

        kept, num_bytes = _outcome_of(keep), self.num_bytes
        if kept.reason is not None:
            return background.run(lambda: kept)
        return background.run(lambda: _outcome_of(lambda: ShardOutcome(
            results, {writer.file_name: background.copy(self._path, num_bytes)})))

    @property
    def _path(self) -> Path:
        return Path(self._writer.checkpoint_dir) / self._writer.file_name

    def finish(self, outcomes: list[ShardOutcome]) -> None:
        """Write the index and the description of a checkpoint whose parts are all there; on rank 0.

        Raises:
            OSError: one of the two cannot be written.
        """
        self._writer.finish(self._metadata, [outcome.results for outcome in outcomes])
        save_config(CheckpointingConfig("torch_dist", 1), str(self._writer.checkpoint_dir))


class _ShardStrategy(TorchDistSaveShardedStrategy):
    """Megatron-Core's strategy, of which the plan alone is carried out."""

    def async_save(self, sharded_state_dict: Any, checkpoint_dir: Any, async_strategy: str = "") -> Any:
        """Plan a save with all ranks, as TorchDistSaveShardedStrategy does."""
        renamed, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        writer = _ShardWriter(checkpoint_dir)
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False,
                                   flatten_sharded_tensors=False)
        planned = save_state_dict_async_plan(mcore_to_pyt_state_dict(renamed, False), writer, None, 0, planner=planner)
        return ShardsToWrite(writer, planned[0][1])


def plan_shards(state: dict[Any, Any], target: Path, group: torch.distributed.ProcessGroup) -> ShardsToWrite:
    """Divide a state among the ranks that hold it; called by every rank.

    Args:
        state: Sharded tensors and objects of this rank, and what is common to all.
        target: Empty folder that all ranks see.
        group: The ranks that hold copies of the same tensors.
    """
    strategy = FullyParallelSaveStrategyWrapper(_ShardStrategy(), group)
    return dist_checkpointing.save(state, str(target), strategy, async_sharded_save=True)


def write_shard_file(path: Path, objects: list[tuple[Any, Any]], tensors: list[tuple[Any, torch.Tensor]],
                     transforms: Any) -> tuple[list[Any], FileChecksums]:
    """Write one file of a checkpoint and flush it to disk.

    Args:
        path: File to make.
        objects: Entries of bytes: torch.distributed.checkpoint's item, and a BytesIO.
        tensors: Entries of tensors: the item, and the tensor, on any device.
        transforms: What torch.distributed.checkpoint's writer has between an entry and the file.

    Returns:
        What the index needs of each entry, and the checksums of the file.

    Raises:
        OSError: the file cannot be written.
    """
    with open(path, "wb") as raw:
        stream: Any = ChecksumStream(raw)
        results = write_entries(stream, path.name, objects, tensors, transforms)
        raw.flush()
        os.fsync(raw.fileno())
        return results, stream.checksums()


def write_entries(stream: Any, file_name: str, objects: list[tuple[Any, Any]],
                  tensors: list[tuple[Any, torch.Tensor]], transforms: Any) -> list[Any]:
    """Write the entries of a file one after the other; arguments and errors as `write_shard_file`."""
    with without_crc32():
        results = [_write_item(transforms, stream, data, item, file_name, SerializationFormat.TORCH_SAVE)
                   for item, data in objects]
        for item, tensor in tensors:
            results.append(_write_item(transforms, stream, _alone_on_host(tensor), item, file_name,
                                       SerializationFormat.TORCH_SAVE))
        return results


def lengths_of(objects: list[tuple[Any, Any]], tensors: list[tuple[Any, torch.Tensor]]) -> list[int]:
    """Bytes of each entry of a file, in the order in which `write_entries` writes them."""
    return [len(data.getbuffer()) for _, data in objects] + [
        frame_of(tensor.dtype, tuple(tensor.shape)).length for _, tensor in tensors]


def put_entries(image: HostImage, file_name: str, objects: list[tuple[Any, Any]],
                tensors: list[tuple[Any, torch.Tensor]]) -> list[Any]:
    """Put together in memory the bytes that `write_entries` would write.

    Args:
        image: Memory with room for them.
        file_name: Name of the file that the bytes are for.
        objects: Entries of bytes: torch.distributed.checkpoint's item, and a BytesIO.
        tensors: Entries of tensors: the item, and the tensor, on any device; it may change when this returns.

    Returns:
        What the index needs of each entry.
    """
    results, places, offset = [], [], 0
    for (item, data), length in zip((*objects, *tensors), lengths_of(objects, tensors), strict=True):
        results.append(WriteResult(index=item.index, size_in_bytes=length,
                                   storage_data=_StorageInfo(file_name, offset, length)))
        if isinstance(data, torch.Tensor):
            frame = frame_of(data.dtype, tuple(data.shape))
            image.put(offset, frame.head)
            places.append((offset + len(frame.head), data))
            image.put(offset + length - len(frame.tail), frame.tail)
        else:
            image.put(offset, data.getbuffer())
        offset += length
    image.put_tensors(places)
    return results


def _outcome_of(write: Callable[[], ShardOutcome]) -> ShardOutcome:
    """What a function gives, or the reason why it raised."""
    try:
        return write()
    except OSError as error:
        return ShardOutcome(reason=why(error))
    except Exception as error:  # noqa: BLE001 - the other ranks wait; told by all of them
        return ShardOutcome(reason=f"{type(error).__name__}: {error}")


def gather_outcomes(mine: ShardOutcome) -> list[ShardOutcome]:
    """What became of every rank's part, by rank; called by every rank, of use on rank 0 alone."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    gathered: list[Any] | None = [None] * size if rank == 0 else None
    torch.distributed.gather_object(mine, gathered, dst=0)
    return gathered or []


def failure_of(outcomes: list[ShardOutcome]) -> str | None:
    """What went wrong on which rank; None if nothing did."""
    return "; ".join(f"process {rank}: {outcome.reason}" for rank, outcome in enumerate(outcomes)
                     if outcome.reason) or None


def checksums_of(outcomes: list[ShardOutcome]) -> Mapping[str, FileChecksums]:
    """The checksums of all ranks' files, by name."""
    return {name: checksums for outcome in outcomes for name, checksums in outcome.checksums.items()}


def _alone_on_host(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the host, contiguous, and without the rest of a storage that it is a part of: torch.save would
    write its strides and that rest too."""
    host = tensor.cpu()
    if host.untyped_storage().nbytes() != host.numel() * host.element_size() or not host.is_contiguous():
        host = host.clone(memory_format=torch.contiguous_format)
    return host.view(-1).view(host.shape)  # an axis of length 1 may have any stride
