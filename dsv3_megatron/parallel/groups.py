"""Process groups of a run: made once, handed on as Megatron-Core's ProcessGroupCollection.

Ranks make only the groups that they are in, one for a set of ranks (`communicators`).

Megatron-Core 0.19 still reads its global `parallel_state` in places, so the groups are created
there; this library's own code takes them from the collection it is passed.

DualPipe holds two copies of the model along one pipeline: ranks r and P-1-r have the same two stages. Their data-
parallel groups are joined (`dp_cp`, `expt_dp`), so that whatever is reduced, sharded or counted over data-parallel
ranks is so over both copies: gradients, the optimizer's shards, the gradient norm, replicas in a checkpoint. `dp` stays
the group of pipelines, of which each takes its own part of the data.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterable, Iterator, Sequence

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from dsv3_megatron.config.guards import UNWATCHED_TIMEOUT_S
from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.config.parallel import ParallelConfig
from dsv3_megatron.parallel.communicators import (
    collective_timeout,
    communicator_options,
    ledger,
    megatron_groups_of_own_ranks,
    set_collective_timeout,
)
from dsv3_megatron.parallel.layout import stage_layouts
from dsv3_megatron.parallel.placement import placement
from dsv3_megatron.parallel.roll_call import meet_ranks
from dsv3_megatron.platform import Device
from dsv3_megatron.process.loopback import is_loopback, use_loopback_interface
from dsv3_megatron.process.ranks import Processes

# Models that use the groups that are there: a process alone may have several, and they share them.
_num_holders = 0


def world_size_from_environment() -> int:
    """Processes of this run as torchrun says (WORLD_SIZE), 1 without it."""
    return Processes.from_environment().world_size


def start_process_group(device: Device, *, timeout_s: float = UNWATCHED_TIMEOUT_S) -> None:
    """Join this run's processes, once all have come; a process started without torchrun is a run of its own.

    Args:
        device: Device of this process.
        timeout_s: Seconds that a message waits for its peer before the process ends, in every group of the run; of a
            run that a watchdog watches, `GuardConfig.collective_timeout_s`. Nothing changes once processes have joined.

    Raises:
        ConfigError: torchrun's variables cannot be, or rank 0 cannot listen.
        PeerError: another process ended instead, or did not come.
    """
    if torch.distributed.is_initialized():
        return
    set_collective_timeout(timeout_s)
    timeout = collective_timeout()
    processes = Processes.from_environment()
    processes.require_rank()
    if processes.address is not None:
        if is_loopback(processes.address):
            use_loopback_interface()
        meet_ranks(processes)
        # What it reads, where it may be left out.
        os.environ.setdefault("MASTER_ADDR", processes.address)
        os.environ.setdefault("MASTER_PORT", str(processes.port))
        torch.distributed.init_process_group(device.backend, timeout=timeout,
                                             pg_options=communicator_options(device.backend))
    else:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(device.backend, store=store, rank=0, world_size=1, timeout=timeout,
                                             pg_options=communicator_options(device.backend))


def create_groups(parallel: ParallelConfig, seed: int) -> ProcessGroupCollection:
    """Split the processes into the run's groups.

    Args:
        parallel: A layout validated against the world size.
        seed: Seeds Megatron-Core's tensor-parallel random-number trackers.

    A process alone may call it again before `destroy_groups`, for another model: the models share the groups, which
    stay until the last of them has left.
    """
    global _num_holders
    if parallel_state.model_parallel_is_initialized() and torch.distributed.get_world_size() == 1:
        _num_holders += 1
        model_parallel_cuda_manual_seed(seed)
        return ProcessGroupCollection.use_mpu_process_groups()
    chunks = parallel.stages_per_rank
    with megatron_groups_of_own_ranks():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
            context_parallel_size=parallel.context_parallel_size,
            expert_model_parallel_size=parallel.expert_model_parallel_size,
            expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
            create_gloo_process_groups=False,
        )
    _num_holders = 1
    model_parallel_cuda_manual_seed(seed)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    if parallel.num_model_copies > 1:
        _join_mirrored_ranks(groups)
    return groups


def pipelines(groups: ProcessGroupCollection) -> list[list[int]]:
    """Global ranks of every pipeline of the run, each in the order of its stages."""
    return all_sets(groups.pp)


def all_sets(group: torch.distributed.ProcessGroup) -> list[list[int]]:
    """The ranks of this group and of all its like: together all ranks of the run, for they are the lines of a grid."""
    own = torch.distributed.get_process_group_ranks(group)
    sets: list[list[int]] = []
    seen: set[int] = set()
    for first in range(torch.distributed.get_world_size()):
        if first not in seen:
            sets.append([first + rank - own[0] for rank in own])
            seen.update(sets[-1])
    assert seen == set(range(torch.distributed.get_world_size())) and sum(map(len, sets)) == len(seen)
    return sets


def own_group(sets: Iterable[Sequence[int]]) -> torch.distributed.ProcessGroup:
    """The group of the set that this rank is in; every rank of the run calls with the same sets."""
    groups = [ledger().group(ranks) for ranks in sets]
    ledger().level()
    return next(group for group in groups if group is not None)


def _join_mirrored_ranks(groups: ProcessGroupCollection) -> None:
    """Let the data-parallel groups of pipeline ranks r and P-1-r be one."""
    num_ranks = groups.pp.size()
    stride = torch.distributed.get_world_size() // num_ranks  # pipeline ranks are the outermost

    def joined(group: torch.distributed.ProcessGroup) -> torch.distributed.ProcessGroup:
        offsets = [(num_ranks - 1 - 2 * (ranks[0] // stride)) * stride for ranks in all_sets(group)]
        return own_group([*ranks, *(rank + offset for rank in ranks)]
                          for ranks, offset in zip(all_sets(group), offsets, strict=True))

    groups.dp_cp = groups.intra_dp_cp = groups.dp_cp_gtp_remat = joined(groups.dp_cp)
    groups.expt_dp = groups.intra_expt_dp = groups.expt_dp_gtp_remat = joined(groups.expt_dp)


def groups_of_gradients(model: ModelConfig, parallel: ParallelConfig, groups: ProcessGroupCollection
                        ) -> ProcessGroupCollection:
    """The groups with which Megatron-Core finishes gradients, given the tokens of a whole pipeline on each rank.

    It sums the tokens over `dp_cp`, which must then have each part of each pipeline's sequences once, also where
    mirrored ranks are joined. The embedding's gradient it sums over `embd`, which must have the ranks with copies of
    the embedding.

    Args:
        model: The run's model.
        parallel: How the model is split.
        groups: The run's process groups; called by every rank of the run, for it makes a group.
    """
    finishing = copy.copy(groups)
    finishing.dp_cp = finishing.dp_cp_gtp_remat = parallel_state.get_data_parallel_group(with_context_parallel=True)
    # Alone where there is no other copy. Without a group Megatron-Core would take that of the first and the last rank.
    lines = pipelines(groups)
    finishing.embd = own_group([ranks[position] for position in copies]
                                for copies in embedding_copies(model, parallel) for ranks in lines)
    return finishing


def embedding_copies(model: ModelConfig, parallel: ParallelConfig) -> tuple[tuple[int, ...], ...]:
    """Which pipeline ranks have the copies of the embedding whose gradients are summed, in ascending order.

    The first stage has the embedding. The stage with the MTP modules has a copy, unless it is on the same rank, where
    it uses the same parameter. Under DualPipe mirrored ranks are summed before, as data-parallel ranks: each half of
    the ranks then has a part of those sums, and its copies.

    Returns:
        By pipeline rank, with itself; itself alone if no other rank has a copy of what it has.
    """
    layouts, places = stage_layouts(model, parallel), placement(parallel)
    holders = [rank for rank, held in enumerate(places)
               if any(layouts[stage].has_embedding or layouts[stage].mtp_layer_ids for _, stage in held)]
    half = len(places) // parallel.num_model_copies
    return tuple(tuple(other for other in holders if other // half == rank // half) if rank in holders else (rank,)
                 for rank in range(len(places)))


def replicas(parallel: ParallelConfig, groups: ProcessGroupCollection) -> list[tuple[int, int]]:
    """Which part of the data goes to each of this rank's chunks: (rank, size) among all copies of the model.

    Ranks that share sequences read the same ones. Each copy counts as a data-parallel rank: direction d of pipeline p
    of DualPipe takes the micro-batches that rank 2p + d of twice as many would. So the samples of a step, and their
    sums, are those of every other layout.
    """
    copies = parallel.num_model_copies
    return [(groups.dp.rank() * copies + place.direction, groups.dp.size() * copies)
            for place in placement(parallel)[groups.pp.rank()]]


class PipelinePosition:
    """Stands for a pipeline's group where Megatron-Core asks it at which of how many ranks a stage is.

    It numbers layers, and tells the first and last stage, by this rank and size. Where a schedule puts a stage on
    another rank than Megatron-Core's numbering does, the stage is built, and saved, at the position of that numbering.
    """

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        """Give the pipeline rank that this object stands for, as a process group does."""
        return self._rank

    def size(self) -> int:
        """Give the number of pipeline ranks, as a process group does."""
        return self._size


def at_pipeline_rank(groups: ProcessGroupCollection, rank: int) -> ProcessGroupCollection:
    """The groups for the modules of a stage at a position of Megatron-Core's numbering.

    There is none for copies of the embedding, which Megatron-Core would fill from one another: `model/init.py` does.
    """
    placed = copy.copy(groups)
    placed.embd = None
    if rank != groups.pp.rank():
        placed.pp = PipelinePosition(rank, groups.pp.size())
    return placed


@contextlib.contextmanager
def as_pipeline_rank(rank: int) -> Iterator[None]:
    """Let Megatron-Core's global state say that this process is another pipeline rank: its layer layouts read it."""
    own = parallel_state.get_pipeline_model_parallel_rank()
    parallel_state.set_pipeline_model_parallel_rank(rank)
    try:
        yield
    finally:
        parallel_state.set_pipeline_model_parallel_rank(own)


def destroy_groups() -> None:
    """Leave the run's groups and the process group, unless another model of this process still uses them."""
    global _num_holders
    _num_holders -= 1
    if _num_holders > 0 and parallel_state.model_parallel_is_initialized():
        return
    _num_holders = 0
    parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
