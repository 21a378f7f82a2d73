"""A checkpoint's tensors on their way into a run: bytes proved as they are read, and nothing run that is in them.

Megatron-Core plans which rank reads what and puts it together; torch.distributed.checkpoint reads. Both take the
readers of this module instead of their own, which unpickle whatever a file holds.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import torch as torch_strategies
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import MCoreLoadPlanner, TorchDistLoadShardedStrategy
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType
from torch.futures import Future

from dsv3_megatron.checkpoint.folder import DamagedCheckpointError, Manifest, damaged
from dsv3_megatron.checkpoint.tensor_frames import known_frame
from dsv3_megatron.checkpoint.tensor_index import READ_ERRORS, read_index
from dsv3_megatron.data.checksums import BlockVerifier, DamagedFileError, damages
from dsv3_megatron.data.hashed_files import ProvedFile
from dsv3_megatron.process.cores import usable_cores
from dsv3_megatron.process.unpickling import load_tensors

logger = logging.getLogger(__name__)

# Parts of a rank's share that are read at a time: a disk, a network and the copying to memory are all faster so.
_MAX_THREADS = 4
_told: set[Path] = set()


class CheckpointFiles:
    """The files of a checkpoint, proved block by block before their bytes are used. Used by several threads.

    Args:
        manifest: What the checkpoint says of its files.
        verify: "read" or "all" compares checksums, where there are any; "none" does not.
    """

    def __init__(self, manifest: Manifest, verify: str = "read") -> None:
        is_verified = verify != "none"
        self.manifest = manifest
        self._verifiers: dict[str, BlockVerifier] = {}
        if manifest.checksums is None:
            if is_verified and manifest.path not in _told:
                _told.add(manifest.path)
                logger.warning("%s has no checksums, it is of an earlier release: its bytes are taken as they are",
                               manifest.path)
        elif is_verified:
            self._verifiers = {name: BlockVerifier(manifest.path / name, checksums)
                               for name, checksums in manifest.checksums.items()}

    @property
    def verifiers(self) -> dict[str, BlockVerifier]:
        """What proves each file, by name; empty where nothing is compared."""
        return self._verifiers

    def require(self, name: str, offset: int, num_bytes: int) -> None:
        """Prove a run of bytes of a file.

        Raises:
            DamagedFileError: the bytes are not what was written.
        """
        if name in self._verifiers:
            self._verifiers[name].require(offset, num_bytes)


class ProvedReader(FileSystemReader):
    """torch.distributed.checkpoint's reader of a checkpoint's files, whose index and bytes are proved.

    Bytes go from a file into the tensor that they are for, and are proved on the way: no byte is read twice, and none
    is copied in between where the tensor has the form in which it was saved.

    Args:
        files: The checkpoint's files.
    """

    def __init__(self, files: CheckpointFiles) -> None:
        super().__init__(files.manifest.path)
        self._files = files

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index, read without running what is in it."""
        metadata = read_index(self._files.manifest)
        assert metadata.storage_meta is not None
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Take the index; called by torch."""
        super().set_up_storage_reader(metadata, is_coordinator, *args, **kwargs)
        self._entries = metadata.state_dict_metadata

    def read_data(self, plan: Any, planner: Any) -> Future[None]:
        """Read what a plan says, in several threads; every byte is proved when this returns.

        Raises:
            DamagedFileError: bytes are not what was written; tensors may hold some of them.
        """
        items = [(self.storage_data[item.storage_index], item) for item in plan.items]
        items.sort(key=lambda each: (each[0].relative_path, each[0].offset))
        num_threads = min(_MAX_THREADS, usable_cores())
        parts: list[list[tuple[Any, Any]]] = [[] for _ in range(num_threads)]
        num_bytes, position = sum(place.length for place, _ in items), 0
        for place, item in items:
            parts[min(num_threads - 1, position * num_threads // max(1, num_bytes))].append((place, item))
            position += place.length
        lock = threading.Lock()  # the planner is for one thread
        with ThreadPoolExecutor(num_threads) as pool:
            for done in [pool.submit(self._read_items, part, planner, lock) for part in parts]:
                done.result()
        read: Future[None] = Future()
        read.set_result(None)
        return read

    def _read_items(self, items: list[tuple[Any, Any]], planner: Any, lock: threading.Lock) -> None:
        """Read a part of a plan, each file from front to back."""
        for name, group in itertools.groupby(items, key=lambda each: each[0].relative_path):
            with ProvedFile(self._files.manifest.path / name, self._files.verifiers.get(name)) as file:
                for place, item in group:
                    if item.type == LoadItemType.BYTE_IO:
                        content = bytearray(place.length)
                        file.read_into(place.offset, content)
                        file.finish()
                        with lock:
                            planner.load_bytes(item, io.BytesIO(content))
                    else:
                        with lock:
                            target = planner.resolve_tensor(item).detach()
                        self._read_tensor(file, place, item, target)
                        with lock:
                            planner.commit_tensor(item, target)

    def _read_tensor(self, file: ProvedFile, place: Any, item: Any, target: torch.Tensor) -> None:
        """Put what a tensor's entry has into the tensor that a plan has it for."""
        if target.shape != torch.Size(item.lengths):
            raise ValueError(f"{item.storage_index.fqn} is {list(item.lengths)} in the index, {list(target.shape)} in "
                             "the run")
        entry = self._entries[item.storage_index.fqn]
        if not isinstance(entry, TensorStorageMetadata):
            raise ValueError(f"{item.storage_index.fqn} is no tensor in the index")
        shape, dtype = _shape_of(entry, item.storage_index), entry.properties.dtype

        def beginning(num_bytes: int) -> bytes:
            content = bytearray(num_bytes)
            file.read_into(place.offset, content)
            return bytes(content)

        frame = known_frame(dtype, shape, place.length, beginning)
        if frame is not None:
            is_same = target.shape == shape and target.dtype == dtype and target.device.type == "cpu"
            saved = target if is_same and target.is_contiguous() else torch.empty(shape, dtype=dtype)
            file.read_into(place.offset + len(frame.head), saved.view(-1).view(torch.uint8).numpy())
        else:
            self._files.require(place.relative_path, place.offset, place.length)
            with open(file.path, "rb") as stream:
                saved = load_tensors(self._slice_file(stream, place))
        if saved is not target:
            for axis, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                saved = saved.narrow(axis, start, length)
            target.copy_(saved)


def _shape_of(entry: TensorStorageMetadata, index: MetadataIndex) -> tuple[int, ...]:
    """Shape of one part of a tensor, by the index."""
    hinted = entry.chunks[index.index: index.index + 1] if index.index is not None else []
    for chunk in (*hinted, *entry.chunks):
        if chunk.offsets == index.offset:
            return tuple(chunk.sizes)
    raise ValueError(f"the index has no part of {index.fqn} at {index.offset}")


class _Planner(MCoreLoadPlanner):
    """Megatron-Core's planner, which makes nothing of bytes but tensors and plain values."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = load_tensors(value)


class _AgreeingStrategy(TorchDistLoadShardedStrategy):
    """Megatron-Core's strategy; what one rank cannot read, every rank raises, for they exchange what they read."""

    def __init__(self, manifest: Manifest) -> None:
        super().__init__()
        self._manifest = manifest

    def load(self, *args: Any, **kwargs: Any) -> Any:
        loaded: Any = None
        failure: BaseException | None = None
        try:
            loaded = super().load(*args, **kwargs)
        except READ_ERRORS as error:
            failure = error
        _agree(self._manifest, failure)
        return loaded


def load_tensors_of(manifest: Manifest, state: dict[Any, Any], group: torch.distributed.ProcessGroup, *,
                    verify: str = "read") -> dict[Any, Any]:
    """What a checkpoint holds of this rank's state, and what it holds besides tensors; called by every rank.

    Args:
        manifest: The checkpoint.
        state: Sharded tensors and objects to fill.
        group: The ranks that hold copies of the same tensors, and divide the reading.
        verify: What is compared with its checksum: "read", what this state needs; "all" files, before; or "none".

    Raises:
        DamagedCheckpointError: on every rank, if any cannot read its part; names the file and the offset.
    """
    strategy = FullyParallelLoadStrategyWrapper(_AgreeingStrategy(manifest), group)
    loaded: Any = None
    failure: BaseException | None = None
    if verify == "all":
        require_all(manifest)
        verify = "none"  # done
    with warnings.catch_warnings(), proved_readers(manifest, verify):
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            loaded = dist_checkpointing.load(state, str(manifest.path), strategy)
        except READ_ERRORS as error:
            failure = error
    _agree(manifest, failure)
    return loaded


@contextlib.contextmanager
def proved_readers(manifest: Manifest, verify: str = "read") -> Iterator[None]:
    """Have Megatron-Core read a checkpoint with this module's readers instead of its own."""
    files = CheckpointFiles(manifest, verify)

    def reader(*_: Any, **__: Any) -> ProvedReader:
        return ProvedReader(files)

    replaced: tuple[tuple[Any, str, Any], ...] = (
        (torch_strategies, "_get_filesystem_reader", reader), (serialization, "_get_filesystem_reader", reader),
        (torch_strategies, "MCoreLoadPlanner", _Planner),
        (serialization, "load_common_state_dict", lambda _path: read_common(files)))
    originals = [(module, name, getattr(module, name)) for module, name, _ in replaced]
    try:
        for module, name, own in replaced:
            setattr(module, name, own)
        yield
    finally:
        for module, name, original in originals:
            setattr(module, name, original)


def require_all(manifest: Manifest) -> None:
    """Prove every file of a checkpoint, each rank some of them; called by every rank.

    Raises:
        DamagedCheckpointError: on every rank, if any is damaged; names every damaged file with its first offset.
    """
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    mine = dict(sorted(CheckpointFiles(manifest).verifiers.items())[rank::size])
    failure: BaseException | None = None
    try:
        failure = next((error for _, error in damages(mine, usable_cores())), None)
    except OSError as error:
        failure = error
    _agree(manifest, failure)


def read_common(files: CheckpointFiles) -> dict[str, Any]:
    """What a checkpoint holds besides tensors; called by every rank.

    Raises:
        DamagedCheckpointError: on every rank, if any cannot read it.
    """
    found: Any = None
    failure: BaseException | None = None
    try:
        found = _common_of(files)
    except READ_ERRORS as error:
        failure = error
    _agree(files.manifest, failure)
    return found


def _agree(manifest: Manifest, mine: BaseException | None) -> None:
    """Raise on every rank what any rank met while reading.

    Raises:
        DamagedCheckpointError: some rank met something; names what each met.
    """
    if isinstance(mine, DamagedCheckpointError):  # every rank has it
        reasons = mine.reasons
    else:
        reasons = (reason_of(mine),) if mine is not None else ()
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, reasons)
    found = tuple(dict.fromkeys(reason for theirs in gathered for reason in theirs))
    if found:
        raise damaged(manifest.path.parent, manifest.progress.iteration, *found) from mine


def reason_of(error: BaseException) -> str:
    """What went wrong in reading, in a line."""
    if isinstance(error, DamagedFileError):
        return str(error)
    return f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"


def _common_of(files: CheckpointFiles) -> dict[str, Any]:
    manifest = files.manifest
    key = ShardedObject("common_state", None, (1,), (0,)).unique_key
    if serialization.COMMON_STATE_FNAME in manifest.files:  # of earlier releases of Megatron-Core
        name = serialization.COMMON_STATE_FNAME
        files.require(name, 0, manifest.files[name])
        content = (manifest.path / name).read_bytes()
        found = load_tensors(io.BytesIO(content))
    else:
        place = (read_index(manifest).storage_data or {})[MetadataIndex(key)]
        files.require(place.relative_path, place.offset, place.length)
        with open(manifest.path / place.relative_path, "rb") as stream:
            stream.seek(place.offset)
            content = stream.read(place.length)
        found = load_tensors(io.BytesIO(content))[0]
    if not isinstance(found, dict):
        raise ValueError("what it holds besides tensors is no dictionary")
    return found
