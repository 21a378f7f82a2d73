"""This rank's shares of the fp32 master weights, with the model's names for them.

Megatron-Core's distributed optimizer (ZeRO-1) flattens parameters into buckets and gives each data-parallel rank an
equal part of every bucket, so that a rank may own a parameter whole, in part, or not at all.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from dsv3_megatron.model.global_names import whole_parameters


@dataclass(frozen=True)
class Named:
    """Elements start .. end of a shard's master weight: those from `first` on of the flattened parameter `name`.

    The name is the model's and global; a weight that holds several experts has a part for each of them. Under tensor
    parallelism `first` counts in this rank's slice of the parameter.
    """

    name: str
    start: int
    end: int
    first: int


@dataclass(frozen=True)
class ParameterShard:
    """The part of one parameter that this rank updates.

    Attributes:
        parameter: The model's parameter on this rank.
        master: fp32, one axis: the master weight of elements start .. end of the flattened parameter. In a model
            trained in fp32 it is a view of the parameter, in bf16 a tensor of its own.
        start: First element.
        end: Index behind the last element.
        part: The distributed optimizer that owns it.
        names: What is in it, in order.
    """

    parameter: torch.nn.Parameter
    master: torch.Tensor
    start: int
    end: int
    part: Any
    names: tuple[Named, ...]


def optimizer_chain(optimizer: MegatronOptimizer) -> list[Any]:
    """The optimizers that Megatron-Core has chained: of dense parameters and of experts, which other ranks share."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def distributed_parts(optimizer: MegatronOptimizer) -> list[Any]:
    """The distributed optimizers of a chain that have parameters here.

    Left out is one that has nothing on this rank: a stub, or one without buffers. Megatron-Core makes the experts' on
    every rank if any has experts, and a stage with the embedding or the head alone has none; its own saving and loading
    fail on such a one.
    """
    return [part for part in optimizer_chain(optimizer) if not part.is_stub_optimizer and part.buffers]


def master_shards(optimizer: MegatronOptimizer, chunks: Iterable[torch.nn.Module], groups: ProcessGroupCollection
                  ) -> Iterator[ParameterShard]:
    """What this rank updates, in the order of the model's parameters.

    Args:
        optimizer: The distributed optimizer over `chunks`.
        chunks: This rank's stages, wrapped.
        groups: The run's process groups.
    """
    owners = {parameter: part for part in distributed_parts(optimizer)
              for parameter in part.model_param_group_index_map}
    wholes = (whole for chunk in chunks for whole in whole_parameters(chunk, groups))
    for _, group_of_names in itertools.groupby(wholes, key=lambda whole: id(whole.parameter)):
        held_names = list(group_of_names)
        parameter = held_names[0].parameter
        part = owners.pop(parameter, None)
        if part is None:  # another rank's
            continue
        group, position = part.model_param_group_index_map[parameter]
        held = part._get_model_param_range_map(parameter)["param"]
        names, offset = [], 0
        for whole in held_names:
            start, end = max(held.start, offset), min(held.end, offset + whole.local.numel())
            if start < end:
                names.append(Named(whole.name, start - held.start, end - held.start, start - offset))
            offset += whole.local.numel()
        yield ParameterShard(parameter, part.optimizer.param_groups[group]["params"][position], held.start, held.end,
                             part, tuple(names))
    assert not owners, "the optimizer has parameters that the stages have not"
