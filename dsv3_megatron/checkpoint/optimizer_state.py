"""AdamW's state in a checkpoint: in the dtypes that the run stores it in, and put back for whichever class holds it."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.optimizer.optimizer import MegatronOptimizer

from dsv3_megatron.checkpoint.folder import Manifest
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.optim.adamw import NarrowMomentAdamW, allocate_moments
from dsv3_megatron.optim.shards import distributed_parts

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def with_padding_between_buckets(part: Any) -> Iterator[None]:
    """Let Megatron-Core gather one distributed optimizer's state to where it then looks for each parameter.

    Megatron-Core 0.19 leaves the padding between a buffer's buckets out of what it gathers, yet takes each parameter
    from its place in the buffer, where the padding is. A parameter in a later bucket (an embedding that another stage
    has a copy of has a bucket of its own) would be saved shifted by the padding before it, with zeros at its end.

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


def as_stored(entry: Any, kind: str, inner: torch.optim.Optimizer) -> Any:
    """An entry of the optimizer in the dtype that it has there; Megatron-Core widens all of them to fp32."""
    dtype = inner.dtypes.get(kind, torch.float32) if isinstance(inner, NarrowMomentAdamW) else torch.float32
    if dtype == torch.float32:
        return entry
    narrow = {"data": entry.data.to(dtype)} | ({"dtype": dtype} if isinstance(entry, ShardedTensor) else {})
    return dataclasses.replace(entry, **narrow)


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
