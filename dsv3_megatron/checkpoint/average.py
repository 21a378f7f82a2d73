"""The moving average of the weights in a checkpoint: whole tensors, under the weights' keys behind a prefix.

Saved and loaded like the optimizer's state: each rank holds a shard of the flattened parameter, the checkpoint the
whole parameter, so that it can be read under any layout, evaluated and exported.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from dsv3_megatron.checkpoint.folder import AVERAGE_PREFIX, Manifest
from dsv3_megatron.checkpoint.tensor_index import saved_tensors
from dsv3_megatron.optim.ema import WeightAverage
from dsv3_megatron.optim.shards import distributed_parts

logger = logging.getLogger(__name__)


def average_entries(average: WeightAverage, models: Iterable[dict[str, Any]], *, is_loading: bool) -> dict[Any, Any]:
    """("average", number) -> sharded tensor, of every parameter of this rank's stages; called by every rank.

    Args:
        average: The average; waited for.
        models: Sharded state of each stage.
        is_loading: The tensors are to be filled, not saved: their values are not gathered.
    """
    average.wait()
    held = {shard.parameter: (shard, values) for shard, values in zip(average.shards, average.averages, strict=True)}
    places = {entry.data: entry for model in models for entry in model.values()
              if isinstance(entry, ShardedTensor | ShardedTensorFactory)}
    entries: dict[Any, Any] = {}
    for parameter, group in _parameters(average):
        if not is_loading and group.size() == 1:
            _, whole = held[parameter]  # all of it
        else:
            whole = torch.zeros(parameter.numel(), dtype=torch.float32, device="cpu")
            if not is_loading:
                if parameter in held:
                    shard, values = held[parameter]
                    whole[shard.start:shard.end] = values
                whole = _merged(whole, group, parameter.device)
        place = places[parameter]
        changes = {"key": AVERAGE_PREFIX + place.key, "data": whole.view(parameter.shape)}
        entries["average", len(entries)] = dataclasses.replace(
            place, **changes, **({"dtype": torch.float32} if isinstance(place, ShardedTensor) else {}))
    return entries


def has_average(manifest: Manifest) -> bool:
    """Whether a checkpoint has an average of the weights.

    Raises:
        DamagedCheckpointError: the checkpoint's index cannot be read.
    """
    return any(key.startswith(AVERAGE_PREFIX) for key in saved_tensors(manifest))


def restorable_average(average: WeightAverage | None, manifest: Manifest) -> WeightAverage | None:
    """The average if the checkpoint has it; a notice where only one of run and checkpoint has one."""
    is_saved = has_average(manifest)
    if is_saved != (average is not None) and torch.distributed.get_rank() == 0:
        logger.info("%s has %s: %s", manifest.path,
                    "an average of the weights" if is_saved else "no average of the weights",
                    "this run has ema_decay=0 and will save none" if is_saved else "it starts with the next step")
    return average if is_saved else None


def restore_average(average: WeightAverage, loaded: dict[Any, Any], num_updates: int) -> None:
    """Put what was loaded for `average_entries` into the average."""
    numbers = {parameter: number for number, (parameter, _) in enumerate(_parameters(average))}
    for shard, values in zip(average.shards, average.averages, strict=True):
        whole = loaded["average", numbers[shard.parameter]]
        values.copy_(whole.reshape(-1)[shard.start:shard.end])
    average.num_updates = num_updates


def _parameters(average: WeightAverage) -> list[tuple[torch.nn.Parameter, torch.distributed.ProcessGroup]]:
    """Every parameter of this rank's stages, with the ranks that share it; in an order that these agree on."""
    return [(parameter, part.data_parallel_group) for part in distributed_parts(average.optimizer)
            for buffer in part.buffers for parameter in buffer.param_index_map]


def _merged(mine: torch.Tensor, group: torch.distributed.ProcessGroup, device: torch.device) -> torch.Tensor:
    """The sum over ranks of which one has an element and the others zero, as integers: exact, and -0.0 stays."""
    bits = mine.view(torch.int32).to(device)
    torch.distributed.all_reduce(bits, group=group)
    return bits.cpu().view(torch.float32)
