"""What `test_nccl_like.py` runs in the processes of a launch: collectives, pipelines, and a whole run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any
from unittest import mock

import torch

from dsv3_megatron.schedule import forward_backward
from dsv3_megatron.schedule.transfers import Edge
from dsv3_megatron.schedule.transport import PipelineChannels
from tests.distributed.guarded_runs import whole_runs


class TwoGroupChannels(PipelineChannels):
    """The transport as it was: a group for what goes to higher ranks, one for what goes to lower ones."""

    def __init__(self, pipelines: Sequence[Sequence[int]], edges: Iterable[Edge], *, device: torch.device) -> None:
        self.rank, self.ways = -1, {}
        for ranks in pipelines:
            for way in ("up", "down"):
                group = torch.distributed.new_group(list(ranks))
                if torch.distributed.get_rank() in ranks:
                    assert isinstance(group, torch.distributed.ProcessGroup)
                    torch.distributed.barrier(group=group)  # the communicator is there: no first contact
                    self.rank, self.ways[way] = group.rank(), group

    def isend(self, tensor: torch.Tensor, destination: int) -> Any:
        group = self.ways["up" if destination > self.rank else "down"]
        return torch.distributed.isend(tensor, group=group, group_dst=destination)

    def irecv(self, tensor: torch.Tensor, source: int) -> Any:
        group = self.ways["up" if source < self.rank else "down"]
        return torch.distributed.irecv(tensor, group=group, group_src=source)


# The first step may take ten times as long.
HANG_TIMEOUT_S = 1.0


def train_as_it_was(data: str, folder: str) -> None:
    """Three steps of 1F1B on four ranks, watched, with two groups for all that goes between them."""
    changes = {"num_layers": 4, "pipeline_model_parallel_size": 4, "global_batch_size": 8, "train_iters": 3,
               "hang_timeout_s": HANG_TIMEOUT_S, "tensorboard_dir": folder}
    with mock.patch.object(forward_backward, "PipelineChannels", TwoGroupChannels):
        whole_runs(data, [("run", changes, [])])


def run_collectives() -> list[torch.Tensor]:
    """One of each, on numbers that differ by rank; the same on every backend."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    numbers = torch.arange(2.0 * size) + 100 * rank
    results = [numbers.clone() for _ in range(3)]
    torch.distributed.all_reduce(results[0])
    torch.distributed.all_reduce(results[1], op=torch.distributed.ReduceOp.MAX)
    torch.distributed.broadcast(results[2], 1)
    gathered = [torch.empty(2 * size) for _ in range(size)]
    torch.distributed.all_gather(gathered, numbers)
    whole, part, mixed = torch.empty(2 * size * size), torch.empty(2), torch.empty(size * (rank + 1))
    torch.distributed.all_gather_into_tensor(whole, numbers)
    torch.distributed.reduce_scatter_tensor(part, numbers)
    sizes = [1 + other for other in range(size)]
    torch.distributed.all_to_all_single(mixed, torch.arange(float(sum(sizes))) + 100 * rank, [rank + 1] * size, sizes)
    objects: list[Any] = [None] * size
    torch.distributed.all_gather_object(objects, rank)
    return [*results, *gathered, whole, part, mixed, torch.tensor(objects)]
