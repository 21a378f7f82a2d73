"""The model's parameters by their global names, whatever the layout and the modules that hold them.

A stage knows its first layer as layer 0, a rank its first expert as expert 0, and a tensor-parallel rank
only a slice. This module says of each local tensor which whole parameters it holds which part of:
for layout-independent initial weights, for comparing layouts, for gathering and exporting.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from dsv3_megatron.config.weights import WEIGHTS, Split, find_weight

# Transformer Engine fuses a norm into the linear that follows it: the name of the norm's weight there, and ours.
_FUSED_NORMS = {weight.engine_name: weight.name for rows in WEIGHTS.values() for weight in rows if weight.fused_into}


@dataclass(frozen=True)
class LocalSlice:
    """A run of rows or columns: `length` entries from `local_start` here are those from `full_start` there."""

    local_start: int
    full_start: int
    length: int


@dataclass(frozen=True)
class WholeParameter:
    """One parameter of the model, and the part of it that this rank holds.

    Attributes:
        name: Global name, e.g. `decoder.layers.5.mlp.experts.17.linear_fc1.weight`.
        shape: Shape of the whole parameter.
        parameter: The local torch parameter, which may hold several experts.
        local: View of the local data that belongs to this name.
        axis: The axis that is split over tensor-parallel ranks, None if it is not split.
        pieces: Which part of that axis is here.
        expert: Index among the local experts, None for what is not a routed expert's.
    """

    name: str
    shape: tuple[int, ...]
    parameter: torch.nn.Parameter
    local: torch.Tensor
    axis: int | None
    pieces: tuple[LocalSlice, ...]
    expert: int | None = None

    def take(self, full: torch.Tensor) -> torch.Tensor:
        """This rank's part of a whole tensor."""
        if self.axis is None:
            return full
        return torch.cat([full.narrow(self.axis, p.full_start, p.length) for p in self.pieces], dim=self.axis)

    def put(self, full: torch.Tensor, local: torch.Tensor) -> None:
        """Write `local`, shaped like this rank's part, into its place in a whole tensor."""
        if self.axis is None:
            full.copy_(local)
            return
        for piece in self.pieces:
            full.narrow(self.axis, piece.full_start, piece.length).copy_(
                local.narrow(self.axis, piece.local_start, piece.length))


def whole_parameters(chunk: torch.nn.Module, groups: ProcessGroupCollection) -> Iterator[WholeParameter]:
    """Every parameter that this stage's module holds, routed experts one by one.

    Args:
        chunk: A stage's module, bare or wrapped.
        groups: The run's process groups.
    """
    for path, parameter in chunk.named_parameters():
        name = global_name(path, chunk)
        if ".experts.linear_fc" in name:
            yield from _experts(name, parameter, groups)
            continue
        partitioned = getattr(parameter, "tensor_model_parallel", False) and groups.tp.size() > 1
        axis = getattr(parameter, "partition_dim") if partitioned else None  # noqa: B009 - a mark on the parameter
        yield _split(name, parameter, parameter.data, axis, groups.tp)


def global_name(path: str, chunk: torch.nn.Module) -> str:
    """The global name of a parameter or, with a dot at the end, of a module.

    Wrappers are stripped, decoder layers numbered globally, Transformer Engine's fusions undone.
    """
    wrapper = re.match(r"(module\.)*", path)
    prefix = wrapper.group(0) if wrapper else ""
    name = path[len(prefix):]
    layer = re.match(r"decoder\.layers\.(\d+)\.", name)
    if layer:
        module: Any = chunk.get_submodule(f"{prefix}decoder.layers.{layer.group(1)}")
        name = f"decoder.layers.{module.layer_number - 1}.{name[layer.end():]}"
    for fused, separate in _FUSED_NORMS.items():
        if name.endswith(fused):
            return name.removesuffix(fused) + separate
    return name


def _experts(name: str, parameter: torch.nn.Parameter, groups: ProcessGroupCollection) -> Iterator[WholeParameter]:
    """The experts in a stacked [e, ...] weight, or the one in a tensor of Transformer Engine's `weightN`."""
    numbered = re.search(r"\.weight(\d+)$", name)
    local_experts = [(int(numbered.group(1)), parameter.data)] if numbered else list(enumerate(parameter.data))
    # `model/build.py` notes the experts per rank on the parameters of a Transformer Engine grouped linear.
    per_rank = getattr(parameter, "num_local_experts") if numbered else parameter.shape[0]  # noqa: B009 - a mark
    # Transformer Engine has a tensor for each expert, `weight3`; all of them have the name of the stacked weight here.
    base = re.sub(r"\.weight\d*$", ".weight", name)
    before, after = base.split(".experts.")
    for index, data in local_experts:
        expert = groups.ep.rank() * per_rank + index
        axis = None
        if groups.expt_tp.size() > 1:
            axis = 0 if find_weight(base).split is Split.COLUMN else 1
        yield _split(f"{before}.experts.{expert}.{after}", parameter, data, axis, groups.expt_tp, expert=index)


def _split(name: str, parameter: torch.nn.Parameter, local: torch.Tensor, axis: int | None,
           group: torch.distributed.ProcessGroup, expert: int | None = None) -> WholeParameter:
    shape, num_parts = list(local.shape), len(find_weight(name).parts)
    if axis is None:
        return WholeParameter(name, tuple(shape), parameter, local, None, (), expert)
    length, rank, ranks = shape[axis], group.rank(), group.size()
    shape[axis] = length * ranks
    # Of parts on top of each other a rank holds its rows of the first (the gate), then those of the next (up).
    own = length // num_parts if axis == 0 else length
    pieces = tuple(LocalSlice(start, ranks * start + rank * own, own) for start in range(0, length, own))
    return WholeParameter(name, tuple(shape), parameter, local, axis, pieces, expert)
