"""Saving and loading a run's state over any layout of processes.

The tensors go through megatron.core.dist_checkpointing: each is known by its global name and its place
in the whole tensor, so that what PP2 x EP2 wrote loads into EP4 or one process, the optimizer's moments
and fp32 weights included. `layout.py` makes a checkpoint appear all at once.

What is saved: weights, the routers' balancing biases, AdamW's state and step, the states of the random
number generators, progress, the configuration. What is not: learning rate, weight decay and the like,
which the resuming run's configuration says.
"""

from __future__ import annotations

import errno
import logging
import os
import queue
import shutil
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    TorchDistLoadShardedStrategy,
    TorchDistSaveShardedStrategy,
)
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch.distributed.checkpoint import CheckpointException

from dsv3_megatron import __version__
from dsv3_megatron.checkpoint.layout import (
    CheckpointError,
    Manifest,
    Progress,
    begin_save,
    check_architecture,
    finish_save,
    incomplete,
    latest_iteration,
    remove_old,
)
from dsv3_megatron.config.run import RunConfig

__all__ = ["CheckpointError", "Progress", "latest_iteration", "load_checkpoint", "save_checkpoint"]

logger = logging.getLogger(__name__)
T = TypeVar("T")

_RNG = "rng_state"
_STEP = "optimizer_step"
# Seconds a folder made by one node may take to be seen by another (attribute caches of network file systems).
_FOLDER_VISIBLE_S = 60.0
# Disk space beyond the tensors themselves: headers, metadata.
_OVERHEAD = 1.05


def save_checkpoint(
    directory: str | Path, progress: Progress, run: RunConfig, chunks: list[torch.nn.Module],
    optimizer: MegatronOptimizer, groups: ProcessGroupCollection, *, keep_last: int
) -> Path:
    """Write the run's state as DIR/iter_<iteration>; called by every rank. A crash never costs an earlier one.

    Args:
        directory: Folder of the run's checkpoints, on a file system that all ranks share.
        progress: How far the run has come.
        run: Its configuration.
        chunks: This rank's stages.
        optimizer: The distributed optimizer over them.
        groups: The run's process groups.
        keep_last: Checkpoints to keep; older ones are removed afterwards. 0 keeps all.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: on every rank, if the folder cannot be written to or the disk is full.
    """
    started = time.monotonic()
    state = _state(chunks, optimizer, groups, is_loading=False)
    state[_RNG] = _rng_state()
    state[_STEP] = _optimizer_step(optimizer)
    _check_space(directory, state)
    target = _on_first_rank(lambda: begin_save(directory, progress.iteration), f"save={directory}")
    _wait_for_folder(target)
    # A save that is not asynchronous needs no second process: without a queue of ours Megatron-Core would
    # start one to hold its queue.
    filesystem_async._results_queue = filesystem_async._results_queue or queue.Queue()
    strategy = FullyParallelSaveStrategyWrapper(TorchDistSaveShardedStrategy(), groups.dp_cp)
    try:
        dist_checkpointing.save(state, str(target), strategy)
    except (CheckpointException, CheckpointingException, OSError) as error:
        # Write errors are raised on every rank, with the reason on the first one only.
        reason = _on_first_rank(lambda: _why_not_written(target, error), f"save={directory}")
        raise CheckpointError(f"save={directory}: iteration {progress.iteration} could not be saved: {reason}; "
                              f"the newest checkpoint is still that of {latest_iteration(directory)}") from error

    def publish() -> Path:
        path = finish_save(
            directory, progress, run.as_dict(), world_size=torch.distributed.get_world_size(),
            precision="bf16" if _stage(chunks[0]).config.bf16 else "fp32",
            versions={"dsv3_megatron": __version__, "torch": torch.__version__,
                      "megatron_core": version("megatron-core")})
        removed = remove_old(directory, progress.iteration, keep_last)
        logger.info("saved %s in %.1f s%s", path, time.monotonic() - started,
                    f"; removed iteration(s) {', '.join(map(str, removed))}" if removed else "")
        return path

    return _on_first_rank(publish, f"save={directory}")


def load_checkpoint(
    directory: str | Path, run: RunConfig, chunks: list[torch.nn.Module], optimizer: MegatronOptimizer,
    groups: ProcessGroupCollection
) -> Progress:
    """Put the newest checkpoint of `directory` into this run's modules and optimizer; called by every rank.

    Bit for bit what was saved, under the layout that wrote it and under any other.

    Args:
        directory: Folder of checkpoints.
        run: This run's configuration.
        chunks: This rank's stages.
        optimizer: The distributed optimizer over them, fresh or used.
        groups: The run's process groups.

    Returns:
        Progress of the run that wrote it.

    Raises:
        CheckpointError: there is none, it is incomplete or unreadable, or of another architecture.
    """
    manifest = _on_first_rank(lambda: check_architecture(directory, run), f"load={directory}")
    _allocate_moments(optimizer)
    state = _state(chunks, optimizer, groups, is_loading=True)
    if _has_same_layout(manifest, run):
        state[_RNG] = _rng_state()
    strategy = FullyParallelLoadStrategyWrapper(TorchDistLoadShardedStrategy(), groups.dp_cp)
    try:
        loaded, missing, unexpected = dist_checkpointing.load(
            state, str(manifest.path), strategy, strict=StrictHandling.RETURN_ALL)
    except (CheckpointException, CheckpointingException, OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        raise CheckpointError(incomplete(directory, manifest.progress.iteration, reason)) from error
    # Megatron-Core's terms: "missing" was saved and not asked for, "unexpected" was asked for and not saved.
    lost = sorted(key for key in missing if not key.startswith(_RNG))
    if lost or unexpected:
        raise CheckpointError(incomplete(
            directory, manifest.progress.iteration,
            f"it lacks {sorted(unexpected)[:3]} and has {lost[:3]} beyond this model ({len(unexpected)} and {len(lost)} "
            "tensors in all)"))
    _restore(loaded, chunks, optimizer)
    if _RNG in loaded:
        _restore_rng_state(loaded[_RNG])
    elif torch.distributed.get_rank() == 0:
        logger.info("%s was written by another layout: random number generators start from the seed", manifest.path)
    return manifest.progress


# ---- the state as one flat dictionary, so that nothing of a layout's structure is saved ----


def _state(chunks: list[torch.nn.Module], optimizer: MegatronOptimizer, groups: ProcessGroupCollection, *,
           is_loading: bool) -> dict[Any, Any]:
    """(what, chunk or optimizer, ...) -> sharded tensor, of this rank."""
    metadata = {
        "dp_cp_group": groups.dp_cp,
        "non_homogeneous_layers": True,
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
    }
    models = {index: _stage(chunk).sharded_state_dict(metadata=metadata) for index, chunk in enumerate(chunks)}
    state: dict[Any, Any] = {
        ("model", index, key): entry for index, entries in models.items() for key, entry in entries.items()}
    for index, part in enumerate(_parts(optimizer)):
        shards = part.sharded_state_dict(models, is_loading, metadata=metadata)["param_state"]
        state |= {("optimizer", index, number, key): entry
                  for number, tensors in shards.items() for key, entry in tensors.items()}
    return state


def _restore(loaded: dict[Any, Any], chunks: list[torch.nn.Module], optimizer: MegatronOptimizer) -> None:
    """Put what was loaded into the modules and the optimizer."""
    models: list[dict[str, Any]] = [{} for _ in chunks]
    parts = _parts(optimizer)
    moments: list[dict[int, dict[str, torch.Tensor]]] = [{} for _ in parts]
    for key, value in loaded.items():
        if key[0] == "model":
            models[key[1]][key[2]] = value
        elif key[0] == "optimizer":
            moments[key[1]].setdefault(key[2], {})[key[3]] = value
    for chunk, weights in zip(chunks, models, strict=True):
        _stage(chunk).load_state_dict(weights, strict=True)
    for part, param_state in zip(parts, moments, strict=True):
        # Everything but the moments and the step is this run's own.
        own = part.state_dict()
        for group in own["optimizer"]["param_groups"]:
            group["step"] = loaded[_STEP]
        part.load_state_dict({**own, "param_state": param_state, "param_state_sharding_type": "fully_reshardable"})


def _stage(chunk: torch.nn.Module) -> Any:
    """The model stage inside its wrappers."""
    while isinstance(getattr(chunk, "module", None), torch.nn.Module):
        chunk = chunk.module
    return chunk


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    """The distributed optimizers of a chain: dense parameters and experts are reduced over different ranks."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _optimizer_step(optimizer: MegatronOptimizer) -> int:
    """Steps that AdamW has made; 0 before the first."""
    _allocate_moments(optimizer)
    steps = {int(group.get("step") or 0) for part in _parts(optimizer)
             for group in part.state_dict()["optimizer"]["param_groups"]}
    assert len(steps) == 1, f"optimizers of one run disagree on their step: {steps}"
    return steps.pop()


def _allocate_moments(optimizer: MegatronOptimizer) -> None:
    """Give torch's AdamW the state that it makes at its first step; others make theirs when it is loaded."""
    for part in _parts(optimizer):
        inner = part.optimizer
        if not isinstance(inner, torch.optim.Adam | torch.optim.AdamW):
            continue
        for group in inner.param_groups:
            for parameter in group["params"]:
                if not inner.state[parameter]:
                    inner.state[parameter] = {
                        "step": torch.tensor(0.0), "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter)}


def _rng_state() -> ShardedObject:
    """States of this rank's random number generators: torch's, and the tensor-parallel trackers'."""
    states = {"cpu": torch.get_rng_state(), "trackers": dict(get_cuda_rng_tracker().get_states())}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return ShardedObject(_RNG, states, (torch.distributed.get_world_size(),), (torch.distributed.get_rank(),))


def _restore_rng_state(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["cpu"])
    # A checkpoint moved between CPU and GPU has states of another kind of generator.
    if torch.cuda.is_available() == ("cuda" in states):
        get_cuda_rng_tracker().set_states(states["trackers"])
        if "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"])


def _has_same_layout(manifest: Manifest, run: RunConfig) -> bool:
    return (manifest.run["parallel"] == run.as_dict()["parallel"]
            and manifest.world_size == torch.distributed.get_world_size())


# ---- what every rank must agree on ----


def _on_first_rank(action: Callable[[], T], subject: str) -> T:
    """Run `action` on rank 0 while the others wait; its result, or its error, on every rank."""
    answer: list[Any] = [None, None]
    failure: Exception | None = None
    if torch.distributed.get_rank() == 0:
        try:
            answer[0] = action()
        except CheckpointError as error:
            answer[1], failure = str(error), error
        except OSError as error:
            what = _disk_full(error) or f"{error.strerror or error} ({error.filename})"
            answer[1], failure = f"{subject}: {what}", error
        except Exception as error:  # noqa: BLE001 - the other ranks wait for an answer; raised below
            answer[1], failure = f"{subject}: {type(error).__name__}: {error}", error
    torch.distributed.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise CheckpointError(answer[1]) from failure
    return answer[0]


def _disk_full(error: OSError) -> str | None:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left ({error.strerror}); free some, lower keep_last, or choose another folder"
    return None


def _why_not_written(target: Path, error: Exception) -> str:
    """The reason of a failed write; Megatron-Core reports that there was one, not always which."""
    try:
        probe = target / ".space"
        with open(probe, "wb") as stream:
            stream.write(bytes(1 << 20))
            stream.flush()
            os.fsync(stream.fileno())
        probe.unlink()
    except OSError as reason:
        return _disk_full(reason) or f"{reason.strerror} ({reason.filename})"
    cause = error if isinstance(error, OSError) else (error.__cause__ or error)
    return f"{type(cause).__name__}: {cause}"


def _check_space(directory: str | Path, state: dict[Any, Any]) -> None:
    """Raise on every rank if the disk has not the room for the whole checkpoint, before any of it is written."""
    mine = 0
    for entry in state.values():
        if isinstance(entry, ShardedTensor | ShardedTensorFactory) and _is_main(entry.replica_id):
            mine += entry.data.numel() * entry.data.element_size()
    total = torch.tensor([mine], dtype=torch.int64, device=torch.cuda.current_device())
    torch.distributed.all_reduce(total)
    needed = int(total.item() * _OVERHEAD)

    def check() -> None:
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise CheckpointError(
                f"save={directory}: a checkpoint needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free there; free "
                "some, lower keep_last, or choose another folder")

    _on_first_rank(check, f"save={directory}")


def _is_main(replica_id: int | tuple[int, ...]) -> bool:
    return replica_id == 0 or (isinstance(replica_id, tuple) and not any(replica_id))


def _wait_for_folder(target: Path) -> None:
    """Raise on every rank if some rank does not see the folder that rank 0 made."""
    deadline = time.monotonic() + _FOLDER_VISIBLE_S
    while not target.is_dir() and time.monotonic() < deadline:
        time.sleep(0.1)
    blind = torch.tensor([0 if target.is_dir() else 1], device=torch.cuda.current_device())
    torch.distributed.all_reduce(blind)
    if blind.item():
        raise CheckpointError(f"save={target.parent}: {blind.item()} of {torch.distributed.get_world_size()} processes do "
                              "not see this folder; choose one on a file system that all nodes share")
