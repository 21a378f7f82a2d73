"""The state of a run as one flat dictionary, so that nothing of a layout's structure is saved, and the way back."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from dsv3_megatron.checkpoint.average import average_entries
from dsv3_megatron.checkpoint.optimizer_state import restore_moments, saved_entries, with_padding_between_buckets
from dsv3_megatron.model.stage.buckets import finish_gathering
from dsv3_megatron.optim.ema import WeightAverage
from dsv3_megatron.optim.shards import distributed_parts

__all__ = ["RNG", "STEP", "num_own_bytes", "precision_of", "restore_models", "restore_rng_state", "restore_state",
           "rng_state", "sharded_state"]

# Keys of the states of random number generators, and of the optimizer's step.
RNG = "rng_state"
STEP = "optimizer_step"


def sharded_state(chunks: list[torch.nn.Module], optimizer: MegatronOptimizer | None,
                  groups: ProcessGroupCollection, *, is_loading: bool, average: WeightAverage | None = None
                  ) -> dict[Any, Any]:
    """The tensors of this rank, each with its place in the whole one.

    Args:
        chunks: This rank's stages.
        optimizer: The distributed optimizer over them; None: of the model alone.
        groups: The run's process groups.
        is_loading: The tensors are to be filled.
        average: The weights' moving average, if the run has one.

    Returns:
        Sharded tensors by (what, number of the chunk or optimizer, ...).
    """
    finish_gathering(chunks)
    metadata = {
        "dp_cp_group": groups.dp_cp,
        "non_homogeneous_layers": True,
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "is_loading": is_loading,
    }
    models = {index: _stage(chunk).sharded_state_dict(metadata=metadata) for index, chunk in enumerate(chunks)}
    state: dict[Any, Any] = {
        ("model", index, key): entry for index, entries in models.items() for key, entry in entries.items()}
    for index, part in enumerate(distributed_parts(optimizer) if optimizer is not None else []):
        if not is_loading:
            state |= {("optimizer", index, *key): entry for key, entry in saved_entries(part, models.values()).items()}
            continue
        with with_padding_between_buckets(part):
            shards = part.sharded_state_dict(models, is_loading, metadata=metadata)["param_state"]
        state |= {("optimizer", index, number, key): entry
                  for number, tensors in shards.items() for key, entry in tensors.items()}
    if average is not None:
        state |= average_entries(average, models.values(), is_loading=is_loading)
    return state


def num_own_bytes(state: dict[Any, Any]) -> int:
    """Bytes of the tensors that are this rank's own to save, not a copy of another's."""
    tensors = [entry for entry in state.values() if isinstance(entry, ShardedTensor | ShardedTensorFactory)]
    return sum(entry.data.numel() * entry.data.element_size() for entry in tensors
               if not any(entry.replica_id if isinstance(entry.replica_id, tuple) else (entry.replica_id,)))


def restore_state(loaded: dict[Any, Any], chunks: list[torch.nn.Module], optimizer: MegatronOptimizer) -> None:
    """Put what was loaded into the modules and the optimizer."""
    restore_models(loaded, chunks)
    parts = distributed_parts(optimizer)
    moments: list[dict[int, dict[str, torch.Tensor]]] = [{} for _ in parts]
    for key, value in loaded.items():
        if key[0] == "optimizer":
            moments[key[1]].setdefault(key[2], {})[key[3]] = value
    for part, param_state in zip(parts, moments, strict=True):
        restore_moments(part, param_state, loaded[STEP])


def restore_models(loaded: dict[Any, Any], chunks: list[torch.nn.Module]) -> None:
    """Put what was loaded into the modules alone."""
    models: list[dict[str, Any]] = [{} for _ in chunks]
    for key, value in loaded.items():
        if key[0] == "model":
            models[key[1]][key[2]] = value
    for chunk, weights in zip(chunks, models, strict=True):
        _stage(chunk).load_state_dict(weights, strict=True)


def _stage(chunk: torch.nn.Module) -> Any:
    """The model stage inside its wrappers."""
    stage: Any = chunk
    while isinstance(getattr(stage, "module", None), torch.nn.Module):
        stage = stage.module
    return stage


def precision_of(chunks: list[torch.nn.Module]) -> str:
    """Name of the dtype that the weights are trained in: "bf16" or "fp32"."""
    return "bf16" if _stage(chunks[0]).config.bf16 else "fp32"


def rng_state() -> ShardedObject:
    """States of this rank's random number generators: torch's, and the tensor-parallel trackers'."""
    states = {"cpu": torch.get_rng_state(), "trackers": dict(get_cuda_rng_tracker().get_states())}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return ShardedObject(RNG, states, (torch.distributed.get_world_size(),), (torch.distributed.get_rank(),))


def restore_rng_state(states: dict[str, Any]) -> None:
    """Put back what `rng_state` took."""
    torch.set_rng_state(states["cpu"])
    # A checkpoint moved between CPU and GPU has states of another kind of generator.
    if torch.cuda.is_available() == ("cuda" in states):
        get_cuda_rng_tracker().set_states(states["trackers"])
        if "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"])
