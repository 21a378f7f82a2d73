"""What a rehearsed checkpoint has in place of a disk and of other ranks: replacements as in `stand_ins.py`.

Run by the run's own code: the state is gathered and cut into shards, the writing of it is divided among the ranks and
planned, tensors are copied to the host, the folder is published; and on resuming, the manifest is read, the reading is
divided, tensors are exchanged and put into modules and optimizer. Not run: no byte is written or read, and what rank 0
makes of all ranks' plans (the index of the checkpoint) is not made, for there are no other ranks' plans.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from dsv3_megatron.data.checksums import FileChecksums, checksum_file
from dsv3_megatron.rehearsal.replacement import Replacement, nothing
from dsv3_megatron.rehearsal.watch import Watch

_SAVER = "megatron.core.dist_checkpointing"


@dataclass
class CheckpointNotes:
    """What a rank would have written.

    Attributes:
        num_bytes: Bytes of tensors that this rank writes; None: nothing was saved.
        shapes: Shapes of the tensors that this rank has a part of, by key.
        common: What is saved besides tensors.
    """

    num_bytes: int | None = None
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    common: dict[str, Any] = field(default_factory=dict)


def checkpoint_replacements(watch: Watch, notes: CheckpointNotes) -> tuple[Replacement, ...]:
    """Everything that is replaced for the saving and loading of one rank."""
    others = "checks the shards of all ranks against one another, of which this one's alone are here"
    return (
        Replacement(shutil, "disk_usage", lambda original: _endless_disk,
                    "says how much room there is, on this machine instead of the run's"),
        Replacement(f"{_SAVER}.state_dict_utils", "validate_sharding_integrity", lambda original: nothing, others),
        Replacement(f"{_SAVER}.strategies.fully_parallel", "validate_sharding_integrity", lambda original: nothing,
                    others),
        Replacement(f"{_SAVER}.validation", "validate_sharding_integrity", lambda original: nothing, others),
        Replacement(torch.distributed, "gather_object", _only_own(watch),
                    "sends pickled objects; rank 0 gets its own"),
        Replacement(_SAVER, "save", _noting(notes),
                    "leaves a checkpoint that can be read; what reading needs of it is noted"),
        Replacement(f"{_SAVER}.strategies.torch.MCoreSavePlanner", "create_global_plan", lambda original: _no_index,
                    "makes the index of all ranks' plans"),
        Replacement("dsv3_megatron.checkpoint.writing", "write_shard_file", lambda original: _counting(notes),
                    "writes tensors, which have no bytes; these are counted"),
        Replacement("dsv3_megatron.checkpoint.writing.ShardsToWrite", "finish", lambda original: _description_alone,
                    "writes the index"),
        Replacement("dsv3_megatron.guards.keeper", "NEEDED_ATTEMPTS", lambda original: 1,
                    "tries again what would fail again"),
        Replacement(f"{_SAVER}.serialization", "verify_checkpoint", lambda original: nothing,
                    "looks for what rank 0 writes"),
        Replacement("dsv3_megatron.checkpoint.tensor_index", "saved_tensors",
                    lambda original: lambda manifest: notes.shapes,
                    "reads the index; here the tensors are those that were saved", is_everywhere=True),
        Replacement("dsv3_megatron.checkpoint.proved_files", "read_common",
                    lambda original: lambda files: {**notes.common}, "reads a file"),
        Replacement(f"{_SAVER}.strategies.torch.TorchDistLoadShardedStrategy", "load", lambda original: _read_in_place,
                    "reads tensors into those that are there"),
        Replacement(f"{_SAVER}.strategies.fully_parallel", "exchange_loaded_objects_gather_object", _own_objects(watch),
                    "sends pickled objects, and refuses the same from two ranks"),
        Replacement("dsv3_megatron.checkpoint.resume", "run_identity", lambda original: nothing,
                    "looks at the files of the data, which are made up"),
        Replacement("dsv3_megatron.checkpoint.resume", "other_data", lambda original: lambda *_: [],
                    "compares them with those of the checkpoint"),
    )


def _endless_disk(path: Any) -> Any:
    return SimpleNamespace(total=1 << 62, used=0, free=1 << 62)


def _only_own(watch: Watch) -> Callable[[Any], Any]:
    def make(original: Any) -> Any:
        @functools.wraps(original)
        def gather_object(obj: Any, object_gather_list: list[Any] | None = None, dst: int = 0, group: Any = None,
                          **_: Any) -> None:
            watch.collectives.record("gather of objects", group or torch.distributed.GroupMember.WORLD, "object", ())
            if object_gather_list is not None:
                object_gather_list[:] = [obj]

        return gather_object

    return make


def _own_objects(watch: Watch) -> Callable[[Any], Any]:
    def make(original: Any) -> Any:
        @functools.wraps(original)
        def exchange_loaded_objects_gather_object(loaded_objects: Any) -> Any:
            watch.collectives.record("all_gather of objects", torch.distributed.GroupMember.WORLD, "object", ())
            return loaded_objects

        return exchange_loaded_objects_gather_object

    return make


def _noting(notes: CheckpointNotes) -> Callable[[Any], Any]:
    def make(original: Any) -> Any:
        @functools.wraps(original)
        def save(state: Mapping[Any, Any], path: str, strategy: Any, **options: Any) -> Any:
            from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor, apply_factories

            notes.num_bytes = 0
            notes.common = {key: value for key, value in state.items() if not isinstance(value, ShardedBase)
                            and not hasattr(value, "build")}
            whole = dict(state)
            planned = original(state, path, strategy, **options)
            apply_factories(whole)
            notes.shapes = {entry.key: tuple(entry.global_shape) for entry in _leaves(whole)
                            if isinstance(entry, ShardedTensor)}
            return planned

        return save

    return make


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in _leaves(item)]
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value]


def _no_index(self: Any, plans: list[Any]) -> tuple[list[Any], Any]:
    return plans, SimpleNamespace()


def _counting(notes: CheckpointNotes) -> Callable[..., tuple[list[Any], FileChecksums]]:
    def write(path: Path, objects: Any, tensors: Any, transforms: Any) -> tuple[list[Any], FileChecksums]:
        notes.num_bytes = (notes.num_bytes or 0) + sum(
            tensor.numel() * tensor.element_size() for _item, tensor in tensors)
        path.touch()
        return [], checksum_file(path)

    return write


def _description_alone(self: Any, outcomes: Any) -> None:
    """The index stays away: rank 0 of the rehearsal has no other ranks' outcomes."""


def _read_in_place(self: Any, state: Any, path: str | Path, async_strategy: str = "") -> Any:
    """What reading gives: the tensors themselves, filled; objects as they are."""
    if isinstance(state, dict):
        return {key: _read_in_place(self, value, path) for key, value in state.items()}
    if isinstance(state, list):
        return [_read_in_place(self, value, path) for value in state]
    return state.data
