"""Linear layers of the local implementation: column-parallel, row-parallel, and replicated.

The products are those of `ops/linear.py` and, in FP8, `ops/fp8/linear.py`; what is split over which ranks, and the
checkpoint format, are Megatron-Core's. Weight gradients are added straight to the fp32 main gradient where data
parallelism has made one; inside a pipeline's segment they can wait (`model/stage/weight_gradients.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from dsv3_megatron.config.precision import LinearPrecision
from dsv3_megatron.model.stage.weight_gradients import weight_grad_deferral
from dsv3_megatron.ops.fp8.linear import fp8_linear
from dsv3_megatron.ops.fp8.reference_backend import ReferenceBackend
from dsv3_megatron.ops.linear import linear

# Lines of the precision map, one for each weight of a module, and what computes them.
Fp8Lines = tuple[tuple[LinearPrecision, ...], ReferenceBackend]


def product(x: torch.Tensor, weight: torch.Tensor, fp8: Fp8Lines | None = None) -> torch.Tensor:
    """y = x W^T, in FP8 where the precision map says so; its weight gradient goes or waits where the run wants it."""
    if fp8 is None:
        return linear(x, weight, accumulate_into_main_grad=True, defer_weight_grad=weight_grad_deferral())
    (precision,), backend = fp8
    return fp8_linear(x, weight, precision, backend=backend, accumulate_into_main_grad=True,
                      defer_weight_grad=weight_grad_deferral())


class LocalColumnParallelLinear(ColumnParallelLinear):
    """Weight [out / TP, in]: each rank computes a slice of the output's features."""

    fp8: Fp8Lines | None = None

    def forward(self, input_: torch.Tensor, weight: torch.Tensor | None = None,
                runtime_gather_output: bool | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[..., in] to this rank's [..., out / TP], or to all of it where asked for; and no bias."""
        if weight is None and _is_product_alone(self):
            return product(input_, self.weight, self.fp8), None
        return super().forward(input_, weight, runtime_gather_output)

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, *_: Any, allreduce_dgrad: bool = False,
                      sequence_parallel: bool = False, tp_group: Any = None, **__: Any) -> torch.Tensor:
        return column_parallel_product(input, weight, sequence_parallel=sequence_parallel,
                                       allreduce_dgrad=allreduce_dgrad, tp_group=tp_group, fp8=self.fp8)


def column_parallel_product(input: torch.Tensor, weight: torch.Tensor, *, sequence_parallel: bool,
                            allreduce_dgrad: bool, tp_group: Any, fp8: Fp8Lines | None = None) -> torch.Tensor:
    """This rank's features of the output.

    Args:
        input: [..., in]; under sequence parallelism this rank's part of the sequence, its first dimension.
        weight: [out / TP, in].
        sequence_parallel: Gather the sequence; in backward, scatter the sum of the input's gradients.
        allreduce_dgrad: The input is whole on every rank; in backward, sum its gradients.
        tp_group: The ranks.
        fp8: The layer's line of the precision map.
    """
    rows = column_parallel_input(input, sequence_parallel=sequence_parallel, allreduce_dgrad=allreduce_dgrad,
                                 tp_group=tp_group)
    return product(rows, weight, fp8)


def column_parallel_input(input: torch.Tensor, *, sequence_parallel: bool, allreduce_dgrad: bool, tp_group: Any
                          ) -> torch.Tensor:
    """The input of a column-parallel layer as every rank reads it, whole; arguments as in `column_parallel_product`."""
    if sequence_parallel:
        return gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=tp_group)
    return copy_to_tensor_model_parallel_region(input, group=tp_group) if allreduce_dgrad else input


class LocalRowParallelLinear(RowParallelLinear):
    """Weight [out, in / TP]: each rank holds a slice of the input's features; outputs are summed."""

    fp8: Fp8Lines | None = None

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """This rank's [..., in / TP] to the sum [..., out]; and no bias."""
        if _is_product_alone(self):
            return product(input_, self.weight, self.fp8), None
        return super().forward(input_)

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return product(input, weight, self.fp8)


def _is_product_alone(layer: ColumnParallelLinear | RowParallelLinear) -> bool:
    """Whether one rank without gradients multiplies: what Megatron-Core does around it takes longer for one token."""
    return not torch.is_grad_enabled() and layer.tp_group.size() == 1


class ReplicatedLinear(torch.nn.Module):
    """Weight [out, in], whole on every tensor-parallel rank, applied to the rank's part of the sequence."""

    fp8: Fp8Lines | None = None

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig) -> None:
        super().__init__()
        # The CPU in a run without CUDA (platform/cpu.py), and meta inside platform.meta_device().
        self.weight = torch.nn.Parameter(
            torch.empty(output_size, input_size, dtype=config.params_dtype, device=torch.cuda.current_device()))
        # Each tensor-parallel rank sees a part of the sequence. Megatron-Core adds up, over these ranks, the gradients
        # of parameters with this mark.
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)

    def forward(self, x_SBI: torch.Tensor) -> torch.Tensor:
        """[..., input_size] -> [..., output_size]."""
        return product(x_SBI, self.weight, self.fp8)
