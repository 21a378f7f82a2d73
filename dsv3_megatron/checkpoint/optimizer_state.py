"""AdamW's state in a checkpoint: in the dtypes that the run stores it in, and put back for whichever class holds it."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.optimizer import MegatronOptimizer

from dsv3_megatron.checkpoint.folder import Manifest
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.optim.adamw import NarrowMomentAdamW, allocate_moments
from dsv3_megatron.optim.shards import distributed_parts

logger = logging.getLogger(__name__)

# Of Megatron-Core's keys of an optimizer's tensors.
_PREFIX = "optimizer.state."


@contextlib.contextmanager
def with_padding_between_buckets(part: Any) -> Iterator[None]:
    """Let Megatron-Core make room for one distributed optimizer's state where it then looks for each parameter.

    Megatron-Core 0.19 leaves the padding between a buffer's buckets out of that room, yet takes each parameter from its
    place in the buffer, where the padding is. A parameter in a later bucket (an embedding that another stage has a copy
    of has a bucket of its own) would get too little.

    Args:
        part: A distributed optimizer; within, all but the last bucket of each of its buffers count their padding.
    """
    buckets = [bucket for buffer in part.buffers for bucket in buffer.buckets[:-1]]
    own_buckets = [bucket.numel_unpadded for bucket in buckets]
    own_buffers = [buffer.numel_unpadded for buffer in part.buffers]
    try:
        for bucket in buckets:
            bucket.numel_unpadded = bucket.grad_data.numel()
        for buffer in part.buffers:
            buffer.numel_unpadded = sum(bucket.numel_unpadded for bucket in buffer.buckets)
        yield
    finally:
        for bucket, numel in zip(buckets, own_buckets, strict=True):
            bucket.numel_unpadded = numel
        for buffer, numel in zip(part.buffers, own_buffers, strict=True):
            buffer.numel_unpadded = numel


def saved_entries(part: Any, models: Iterable[dict[str, Any]]) -> dict[tuple[int, str], Any]:
    """The fp32 weights and moments of one distributed optimizer, in the dtypes that it stores them in.

    Those of Megatron-Core's `fully_reshardable`: whole tensors in the shapes of the model's, under their keys. Where no
    other rank has a part of them, they are the optimizer's own memory and nothing is copied; Megatron-Core would copy
    all of it four times. Otherwise the ranks that share them gather each of them once; called by all of these.

    Args:
        part: The distributed optimizer, whose state has been allocated.
        models: Sharded state of each stage.

    Returns:
        Sharded tensors by (number of the parameter, "param", "exp_avg" or the like).
    """
    places = {entry.data: entry for model in models for entry in model.values()
              if isinstance(entry, ShardedTensor | ShardedTensorFactory)}
    entries: dict[tuple[int, str], Any] = {}
    number = 0
    for buffer, by_dtype in zip(part.buffers, part.gbuf_ranges, strict=True):
        (ranges,) = by_dtype.values()
        whole = _own_tensors(part, ranges) if part.data_parallel_group.size() == 1 else _gathered(part, buffer, ranges)
        for parameter in buffer.param_index_map:
            place = places[parameter]
            for kind, values in whole[parameter].items():
                entries[number, kind] = dataclasses.replace(
                    place, key=f"{_PREFIX}{kind}.{place.key}", data=values.view(place.data.shape),
                    **({"dtype": values.dtype} if isinstance(place, ShardedTensor) else {}))
            number += 1
    return entries


def _own_tensors(part: Any, ranges: list[dict[str, Any]]) -> dict[Any, dict[str, torch.Tensor]]:
    """Flat tensors by parameter and kind, of a rank that shares them with no other."""
    return {parameter: _shard(part, parameter) for bucket in ranges for parameter in bucket["param_map"]}


def _gathered(part: Any, buffer: Any, ranges: list[dict[str, Any]]) -> dict[Any, dict[str, torch.Tensor]]:
    """Flat tensors by parameter and kind, of ranks that each have an equal part of every bucket of a buffer."""
    group = part.data_parallel_group
    found: dict[Any, dict[str, torch.Tensor]] = {parameter: {} for parameter in buffer.param_index_map}
    for bucket, own in zip(buffer.buckets, ranges, strict=True):
        shards = {parameter: _shard(part, parameter) for parameter in own["param_map"]}
        size = bucket.grad_data.numel()
        for kind in _kinds(part):
            # Padding is in no tensor, so it may hold anything.
            mine = torch.empty(size // group.size(), dtype=_dtype(part, kind), device=bucket.grad_data.device)
            for parameter, places in own["param_map"].items():
                mine[places["gbuf_local"].start:places["gbuf_local"].end] = shards[parameter][kind]
            whole = torch.empty(size, dtype=mine.dtype, device=mine.device)
            torch.distributed.all_gather(list(whole.chunk(group.size())), mine, group)
            whole = whole.cpu()
            for parameter in bucket.params:
                start, end = (place - bucket.offset for place in buffer.param_index_map[parameter][:2])
                found[parameter][kind] = whole[start:end]
    return found


def _shard(part: Any, parameter: Any) -> dict[str, torch.Tensor]:
    """This rank's elements of a parameter's fp32 weights and moments."""
    held = part._get_main_param_and_optimizer_states(parameter)
    return {kind: held[kind].detach().to(_dtype(part, kind)).view(-1) for kind in _kinds(part)}


def _kinds(part: Any) -> tuple[str, ...]:
    return ("param", *part.optimizer_state_keys)


def _dtype(part: Any, kind: str) -> torch.dtype:
    inner = part.optimizer
    return inner.dtypes.get(kind, torch.float32) if isinstance(inner, NarrowMomentAdamW) else torch.float32


def report_change_of_moments(manifest: Manifest, run: RunConfig) -> None:
    """Say it where the moments change their dtype: bf16 to fp32 is exact, fp32 to bf16 rounds them to nearest, once."""
    for name in ("exp_avg_dtype", "exp_avg_sq_dtype"):
        # What the writing version did not have yet was fp32.
        stored, mine = manifest.run["training"].get(name, "fp32"), getattr(run.training, name)
        if stored != mine and torch.distributed.get_rank() == 0:
            logger.info("%s has %s=%s, this run %s: %s", manifest.path, name, stored, mine,
                        "rounded to nearest" if mine == "bf16" else "widened exactly")


def restore_moments(part: Any, param_state: dict[int, dict[str, torch.Tensor]], step: int) -> None:
    """Put moments and fp32 weights into one distributed optimizer, and set its step.

    Megatron-Core 0.19 keeps a "step" per parameter apart for torch's AdamW and then looks for it among the
    loaded tensors, and it would give all parameters one step tensor, to be counted up once for each.
    """
    inner = part.optimizer
    has_tensor_steps = isinstance(inner, torch.optim.Adam | torch.optim.AdamW)
    devices = {parameter: state.pop("step").device for parameter, state in inner.state.items() if has_tensor_steps}
    part.load_parameter_state_from_fully_reshardable(param_state)
    for parameter, device in devices.items():
        inner.state[parameter]["step"] = torch.tensor(float(step), device=device)
    if not has_tensor_steps:
        for group in inner.param_groups:
            group["step"] = step


def optimizer_step(optimizer: MegatronOptimizer) -> int:
    """Steps that AdamW has made; 0 before the first."""
    steps = {int(group.get("step") or 0) for part in distributed_parts(optimizer)
             for group in part.state_dict()["optimizer"]["param_groups"]}
    assert len(steps) == 1, f"optimizers of one run disagree on their step: {steps}"
    return steps.pop()


def allocate_all_moments(optimizer: MegatronOptimizer) -> None:
    """Give each optimizer of a chain the state that it makes at its first step."""
    for part in distributed_parts(optimizer):
        allocate_moments(part.optimizer)
