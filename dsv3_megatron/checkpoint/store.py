"""Saving and loading a run's state over any layout of processes.

The tensors go through megatron.core.dist_checkpointing: each is known by its global name and its place
in the whole tensor, so that what PP2 x EP2 wrote loads into EP4 or one process, the optimizer's moments
and fp32 weights included. `folder.py` makes a checkpoint appear all at once.

What is saved: weights, the routers' balancing biases, AdamW's state and step, the weights' moving average, the states
of the random number generators, progress, the configuration. What is not: learning rate, weight decay and the like,
which the resuming run's configuration says.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from dsv3_megatron.checkpoint.agreement import check_space, on_first_rank, wait_for_folder, why, with_way_out
from dsv3_megatron.checkpoint.average import has_average, restorable_average, restore_average
from dsv3_megatron.checkpoint.background import BackgroundWriter
from dsv3_megatron.checkpoint.folder import (
    AVERAGE_PREFIX,
    MASTER_PREFIX,
    TRAINING,
    WEIGHTS,
    CheckpointError,
    Manifest,
    RunProgress,
    begin_save,
    check_architecture,
    finish_save,
    latest_iteration,
    no_average,
    remove_old,
)
from dsv3_megatron.checkpoint.optimizer_state import (
    allocate_all_moments,
    optimizer_step,
    report_change_of_moments,
)
from dsv3_megatron.checkpoint.pending import PendingSave, can_write_behind
from dsv3_megatron.checkpoint.proved_files import load_tensors_of
from dsv3_megatron.checkpoint.run_state import (
    RNG,
    STEP,
    num_own_bytes,
    precision_of,
    restore_models,
    restore_rng_state,
    restore_state,
    rng_state,
    sharded_state,
)
from dsv3_megatron.checkpoint.tensor_index import saved_tensors
from dsv3_megatron.checkpoint.text_files import TextFiles
from dsv3_megatron.checkpoint.writing import ShardOutcome, checksums_of, failure_of, plan_shards
from dsv3_megatron.config.parallel import is_same_layout
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.config.version import __version__
from dsv3_megatron.optim.ema import WeightAverage

__all__ = ["CheckpointError", "RunProgress", "latest_iteration", "load_checkpoint", "load_weights", "save_checkpoint",
           "start_checkpoint"]

logger = logging.getLogger(__name__)

_AVERAGE_UPDATES = "average_updates"
_OPTIMIZER_PREFIX = "optimizer."
_MTP_PREFIX = "mtp."


def save_checkpoint(
    directory: str | Path, progress: RunProgress, run: RunConfig, chunks: list[torch.nn.Module],
    optimizer: MegatronOptimizer | None, groups: ProcessGroupCollection, *, keep_last: int,
    average: WeightAverage | None = None, text_files: TextFiles | None = None, run_id: str | None = None
) -> Path:
    """Write the run's state as DIR/iter_<iteration>; called by every rank. A crash never costs an earlier one.

    Args:
        directory: Folder of the run's checkpoints, on a file system that all ranks share.
        progress: How far the run has come.
        run: Configuration of the run.
        chunks: This rank's stages.
        optimizer: The distributed optimizer over them; None writes the weights alone, to start a run from.
        groups: The run's process groups.
        keep_last: Checkpoints to keep; older ones are removed afterwards. 0 keeps all.
        average: The weights' moving average, if the run has one.
        text_files: What the checkpoint keeps of the run's tokenizer; rank 0's are written.
        run_id: Identity of the run, by which its folders know it.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: on every rank, if the folder cannot be written to or the disk is full.
    """
    return start_checkpoint(directory, progress, run, chunks, optimizer, groups, keep_last=keep_last, average=average,
                            text_files=text_files, run_id=run_id).finish()


def start_checkpoint(
    directory: str | Path, progress: RunProgress, run: RunConfig, chunks: list[torch.nn.Module],
    optimizer: MegatronOptimizer | None, groups: ProcessGroupCollection, *, keep_last: int,
    average: WeightAverage | None = None, text_files: TextFiles | None = None, run_id: str | None = None,
    background: BackgroundWriter | None = None, before_publishing: Callable[[], None] = lambda: None
) -> PendingSave:
    """Begin what `save_checkpoint` does. The state is that of now, whatever training does to it afterwards.

    Args:
        background: What writes behind training, on every rank or on none; without it, and where a host has not the
            memory for it, the parts of all ranks are on disk when this returns.
        before_publishing: Run on rank 0 before the checkpoint gets its name; it is not given one if this raises.

    Returns:
        The save, of which `finish` gives the folder.

    Raises:
        CheckpointError: on every rank, if the folder cannot be written to or has not the room.
    """
    started = time.monotonic()
    if optimizer is not None:
        allocate_all_moments(optimizer)
    state = sharded_state(chunks, optimizer, groups, is_loading=False, average=average)
    state[STEP] = 0 if optimizer is None else optimizer_step(optimizer)
    if optimizer is not None:
        state[RNG] = rng_state()
    if average is not None:
        state[_AVERAGE_UPDATES] = average.num_updates
    check_space(directory, num_own_bytes(state))
    target = on_first_rank(lambda: begin_save(directory, progress.iteration), f"save={directory}")
    wait_for_folder(target)
    shards = plan_shards(state, target, groups.dp_cp)
    # Of this moment: the guards' state is in use, and goes on changing.
    progress, settings, precision = copy.deepcopy(progress), run.as_dict(), precision_of(chunks)

    def publish(outcomes: list[ShardOutcome]) -> Path:
        failure = failure_of(outcomes)
        if failure:
            raise CheckpointError(f"save={directory}: iteration {progress.iteration} could not be saved: "
                                  f"{with_way_out(failure)}; the newest checkpoint is still that of iteration "
                                  f"{latest_iteration(directory)}")
        before_publishing()
        shards.finish(outcomes)
        if text_files is not None:
            text_files.write(target)
        path = finish_save(
            directory, progress, settings, world_size=torch.distributed.get_world_size(),
            precision=precision, run_id=run_id, contents=TRAINING if optimizer is not None else WEIGHTS,
            versions={"dsv3_megatron": __version__, "torch": torch.__version__,
                      "megatron_core": version("megatron-core")}, checksums=checksums_of(outcomes))
        removed = _remove_old(directory, progress.iteration, keep_last)
        logger.info("saved %s in %.1f s%s", path, time.monotonic() - started,
                    f"; removed iteration(s) {', '.join(map(str, removed))}" if removed else "")
        return path

    subject = f"save={directory}: iteration {progress.iteration} could not be saved"
    if background is not None and can_write_behind(background, shards.num_bytes):
        return PendingSave(progress.iteration, target, subject, writing=shards.write_behind(background),
                           publish=publish, run=background.run)
    return PendingSave(progress.iteration, target, subject, writing=_done(shards.write), publish=publish, run=_done)


def _done[T](action: Callable[[], T]) -> Future[T]:
    """What an action gives or raises, which has been run at once."""
    future: Future[T] = Future()
    try:
        future.set_result(action())
    except Exception as error:  # noqa: BLE001 - raised by whoever asks for the result
        future.set_exception(error)
    return future


def _remove_old(directory: str | Path, newest: int, keep_last: int) -> list[int]:
    """Remove old checkpoints; that one cannot be removed costs nothing but its place, and is said."""
    try:
        return remove_old(directory, newest, keep_last)
    except OSError as error:
        logger.warning("save=%s: an old checkpoint cannot be removed: %s", directory, why(error))
        return []


def load_checkpoint(
    directory: str | Path, run: RunConfig, chunks: list[torch.nn.Module], optimizer: MegatronOptimizer,
    groups: ProcessGroupCollection, *, average: WeightAverage | None = None, iteration: int | None = None
) -> RunProgress:
    """Put a checkpoint of `directory` into this run's modules and optimizer; called by every rank.

    Bit for bit what was saved, under the layout that wrote it and under any other. A checkpoint of weights alone, as
    converted from Hugging Face's, starts a run: the optimizer's fp32 weights are what it holds, its moments zero.

    Args:
        directory: Folder of checkpoints.
        run: This run's configuration.
        chunks: This rank's stages.
        optimizer: The distributed optimizer over them, fresh or used.
        groups: The run's process groups.
        average: The weights' moving average, if this run has one; it starts anew where the checkpoint has none.
        iteration: Step of the checkpoint; None: the newest.

    Returns:
        Progress of the run that wrote it.

    Raises:
        CheckpointError: there is none, or it is of another architecture.
        DamagedCheckpointError: the checkpoint is not what was written, told on every rank; modules and optimizer may
            hold a part of it.
    """
    manifest = on_first_rank(lambda: check_architecture(directory, run, iteration), f"load={directory}")
    allocate_all_moments(optimizer)
    average = restorable_average(average, manifest)
    state = sharded_state(chunks, optimizer, groups, is_loading=True, average=average)
    if manifest.contents == TRAINING and _has_same_layout(manifest, run):
        state[RNG] = rng_state()
    loaded = _read(manifest, state, groups, run.checkpoint.verify_files)
    restore_state(loaded, chunks, optimizer)
    if average is not None:
        restore_average(average, loaded, loaded[_AVERAGE_UPDATES])
    if manifest.contents == TRAINING:
        report_change_of_moments(manifest, run)
    if manifest.contents == WEIGHTS:
        return manifest.progress
    if manifest.precision != precision_of(chunks):
        _take_fp32_weights(chunks)
    if RNG in loaded:
        restore_rng_state(loaded[RNG])
    elif torch.distributed.get_rank() == 0:
        logger.info("%s was written by another layout: random number generators start from the seed", manifest.path)
    return manifest.progress


def load_into_new_run(directory: str | Path, run: RunConfig, base: RunConfig, chunks: list[torch.nn.Module],
                      optimizer: MegatronOptimizer, groups: ProcessGroupCollection) -> None:
    """Begin a run with the weights and router biases of a checkpoint of another one; called by every rank.

    The optimizer's fp32 weights are the other run's where the checkpoint has its whole state, else its weights. The
    optimizer's step and moments are zero.

    Args:
        directory: Folder of checkpoints, of which the newest is taken.
        run: The run that begins.
        base: A run of the checkpoint's architecture; it may have MTP modules that the new run leaves out.
        chunks: This rank's stages.
        optimizer: The distributed optimizer over them, fresh.
        groups: The run's process groups.

    Raises:
        CheckpointError: there is none, or it is of another architecture.
        DamagedCheckpointError: the checkpoint is not what was written.
    """
    manifest = on_first_rank(lambda: check_architecture(directory, base), f"load={directory}")
    allocate_all_moments(optimizer)
    state = sharded_state(chunks, optimizer, groups, is_loading=True)
    loaded = _load_into_new_run(manifest, state, groups, run.checkpoint.verify_files)
    loaded[STEP] = 0
    restore_state(loaded, chunks, optimizer)
    if manifest.precision != precision_of(chunks):
        _take_fp32_weights(chunks)


def _take_fp32_weights(chunks: list[torch.nn.Module]) -> None:
    """Put the optimizer's fp32 weights into the modules: what these have came rounded, from a run in bf16."""
    for chunk in list[Any](chunks):
        chunk.start_param_sync(force_sync=True)  # a replica's own share replaces the others' everywhere


def load_weights(directory: str | Path, run: RunConfig, chunks: list[torch.nn.Module], groups: ProcessGroupCollection,
                 *, is_average: bool = False) -> RunProgress:
    """Put the weights and router biases of the newest checkpoint of `directory` into modules that nothing trains.

    Called by every rank. The optimizer's part of the checkpoint, most of its bytes, is not read. Values are converted
    to the modules' dtype.

    Args:
        directory: Folder of checkpoints.
        run: The configuration that the modules were built from.
        chunks: This rank's stages, bare or wrapped.
        groups: The run's process groups.
        is_average: Take the weights' moving average instead of the weights; the router biases are as they are.

    Returns:
        Progress of the run that wrote it.

    Raises:
        CheckpointError: there is none, it is incomplete or unreadable, of another architecture, or has no average.
    """
    manifest = on_first_rank(lambda: check_architecture(directory, run), f"load={directory}")
    state = sharded_state(chunks, None, groups, is_loading=True)
    if is_average:
        if not has_average(manifest):
            raise CheckpointError(no_average(manifest))
        parameters = {parameter for chunk in chunks for parameter in chunk.parameters()}
        for entry in state.values():
            if entry.data in parameters:
                entry.key = AVERAGE_PREFIX + entry.key
    restore_models(_read(manifest, state, groups, run.checkpoint.verify_files), chunks)
    return manifest.progress


# ---- what a checkpoint has for a state ----


def _read(manifest: Manifest, state: dict[Any, Any], groups: ProcessGroupCollection, verify: str) -> dict[Any, Any]:
    """What the checkpoint has for each entry of `state`.

    Raises:
        CheckpointError: the checkpoint is damaged, or does not fit.
    """
    if manifest.contents == WEIGHTS and _has_optimizer(state):
        return _load_into_new_run(manifest, state, groups, verify)
    _check_tensors(manifest, state, groups)
    return load_tensors_of(manifest, state, groups.dp_cp, verify=verify)


def _has_optimizer(state: dict[Any, Any]) -> bool:
    return any(key[0] == "optimizer" for key in state)


def _load_into_new_run(manifest: Manifest, state: dict[Any, Any], groups: ProcessGroupCollection, verify: str
                       ) -> dict[Any, Any]:
    """The state of a run that begins with the checkpoint's weights.

    They are read twice: in the modules' dtype, and in fp32 for the optimizer, so that what is stored in fp32 is not
    rounded to bf16 on the way.
    """
    weights = {key: entry for key, entry in state.items() if key[0] == "model"}
    moments = {key: entry for key, entry in state.items() if key[0] == "optimizer" and key[3] != "param"}
    masters = {key: entry for key, entry in state.items() if key[0] == "optimizer" and key[3] == "param"}
    _check_tensors(manifest, weights, groups)
    loaded = load_tensors_of(manifest, weights, groups.dp_cp, verify=verify)
    for entry in masters.values() if manifest.contents == WEIGHTS else ():
        # Under the key of the weight itself.
        assert entry.key.startswith(MASTER_PREFIX), entry.key
        entry.key = entry.key.removeprefix(MASTER_PREFIX)
    loaded |= load_tensors_of(manifest, masters, groups.dp_cp, verify=verify)
    for key, entry in moments.items():
        loaded[key] = entry.data.zero_()
    return loaded


def _check_tensors(manifest: Manifest, state: dict[Any, Any], groups: ProcessGroupCollection) -> None:
    """Check that the checkpoint has every tensor of this state, in its shape, and no other.

    The optimizer's tensors and the weights' average may be there without being asked for.

    Raises:
        CheckpointError: the checkpoint has not, for example because it was written with other modules.
    """
    wanted: dict[str, tuple[int, ...]] = {}
    for entry in state.values():
        built = entry.build() if isinstance(entry, ShardedTensorFactory) else entry
        wanted |= {shard.key: tuple(shard.global_shape) for shard in nested_values([built])
                   if isinstance(shard, ShardedTensor)}
    stages: list[Any] = [None] * groups.pp.size()
    torch.distributed.all_gather_object(stages, wanted, group=groups.pp)
    wanted = {key: shape for stage in stages for key, shape in stage.items()}
    # An average that takes the place of a weight stands for it.
    known = wanted.keys() | {key.removeprefix(AVERAGE_PREFIX) for key in wanted}
    # So may the MTP modules of a base model; a run with other ones than its checkpoint's has been refused already.
    optional = tuple(prefix for prefix in (_OPTIMIZER_PREFIX, AVERAGE_PREFIX, _MTP_PREFIX)
                     if not any(key.startswith(prefix) for key in wanted))
    saved = {key: size for key, size in saved_tensors(manifest).items()
             if not optional or not key.startswith(optional)}
    wrong = [f"{key} of shape {shape} has {saved.get(key, 'no tensor')} there" for key, shape in sorted(wanted.items())
             if saved.get(key) != shape]
    wrong += [f"{key} is there and not in this model" for key in sorted(saved.keys() - known)]
    if wrong:
        raise CheckpointError(f"checkpoint {manifest.path} does not fit this model in {len(wrong)} tensors: "
                              f"{'; '.join(wrong[:3])}. It was written by dsv3_megatron "
                              f"{manifest.versions.get('dsv3_megatron')}, this is {__version__}")


def _has_same_layout(manifest: Manifest, run: RunConfig) -> bool:
    return (is_same_layout(manifest.run["parallel"], run.as_dict()["parallel"])
            and manifest.world_size == torch.distributed.get_world_size())
