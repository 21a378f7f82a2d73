"""Process groups of a run: made once, handed on as Megatron-Core's ProcessGroupCollection.

Megatron-Core 0.19 still reads its global `parallel_state` in places, so the groups are created
there; this library's own code takes them from the collection it is passed.
"""

from __future__ import annotations

import datetime
import os

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from dsv3_megatron.config.parallel import ParallelConfig
from dsv3_megatron.platform import Device

COLLECTIVE_TIMEOUT_S = 600


def world_size_from_environment() -> int:
    """Processes of this run as torchrun says (WORLD_SIZE), 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start_process_group(device: Device) -> None:
    """Join this run's processes; a process started without torchrun is a run of its own."""
    if torch.distributed.is_initialized():
        return
    timeout = datetime.timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    if "RANK" in os.environ:
        torch.distributed.init_process_group(device.backend, timeout=timeout)
    else:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(device.backend, store=store, rank=0, world_size=1, timeout=timeout)


def create_groups(parallel: ParallelConfig, seed: int) -> ProcessGroupCollection:
    """Split the processes into the run's groups.

    Args:
        parallel: A layout validated against the world size.
        seed: Seeds Megatron-Core's tensor-parallel random-number trackers.
    """
    chunks = parallel.num_virtual_stages_per_pipeline_rank
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        create_gloo_process_groups=False,
    )
    model_parallel_cuda_manual_seed(seed)
    return ProcessGroupCollection.use_mpu_process_groups()


def destroy_groups() -> None:
    """Leave the run's groups and the process group."""
    parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
