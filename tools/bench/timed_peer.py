"""Megatron-Core's own pipeline functions on stages of known times: what the executor is compared with."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig

from dsv3_megatron.parallel.communicators import megatron_groups_of_own_ranks
from dsv3_megatron.schedule.plan import Plan
from tools.bench.timed_combined import combined_forward_step
from tools.bench.timed_stages import SHAPE, ChunkTimes, Rank

# What `overlap_moe_expert_parallel_comm` asks of a configuration before it allows itself.
COMBINED = {"overlap_moe_expert_parallel_comm": True, "delay_wgrad_compute": True, "num_moe_experts": 2,
            "expert_model_parallel_size": 2, "moe_token_dispatcher_type": "alltoall", "bf16": True,
            "params_dtype": torch.bfloat16}


class _Pass(torch.autograd.Function):
    """Sleeps through a stage's forward, and its backward."""

    @staticmethod
    def forward(ctx: Any, input_SBH: torch.Tensor, stage: TimedModule) -> torch.Tensor:
        ctx.stage = stage
        stage.rank.compute(stage.times.forward + stage.times.transfer)
        return torch.zeros(SHAPE)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        times = ctx.stage.times
        ctx.stage.rank.compute(times.input_part + times.weight + times.transfer)
        return torch.zeros(SHAPE), None


class TimedModule(torch.nn.Module):
    """One stage as Megatron-Core's functions want it."""

    model_type = ModelType.encoder_or_decoder

    def __init__(self, config: TransformerConfig, times: ChunkTimes, rank: Rank, *, is_last: bool) -> None:
        super().__init__()
        self.config, self.times, self.rank, self.is_last = config, times, rank, is_last
        self.input: torch.Tensor | None = None

    def build_schedule_plan(self) -> None:
        """The combined plan looks for this name; the plan comes from the forward step."""

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Called before each forward pass."""
        self.input = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def forward(self) -> torch.Tensor:
        """[S, B, H], or the loss."""
        given = torch.zeros(SHAPE, requires_grad=True) if self.input is None else self.input
        output = _Pass.apply(given, self)
        return output.sum() if self.is_last else output


def _forward_step(_batches: Iterator[Any], module: TimedModule) -> tuple[torch.Tensor, Any]:
    return module(), lambda loss: (loss, torch.tensor(1), {})


def measure_megatron_core(plan: Plan, times: ChunkTimes, repeats: int, *, is_combined: bool = False) -> float:
    """Steps of 1F1B or interleaved 1F1B by Megatron-Core; called by every rank of the default process group.

    All-to-alls are part of the passes: only the combined plan overlaps them. One step more is run first, for
    connections are made in it.

    Args:
        plan: Says the schedule and its sizes; Megatron-Core makes its own order.
        times: Of each chunk.
        repeats: Steps.
        is_combined: Interleaved 1F1B with `overlap_moe_expert_parallel_comm`: a forward and a backward pass as pairs.

    Returns:
        Of the fastest step the longest time of a rank, milliseconds; the same on every rank.
    """
    virtual = plan.num_chunks if plan.num_chunks > 1 else None
    with megatron_groups_of_own_ranks():
        parallel_state.initialize_model_parallel(pipeline_model_parallel_size=plan.num_ranks,
                                                 virtual_pipeline_model_parallel_size=virtual,
                                                 create_gloo_process_groups=False)
    config = TransformerConfig(
        num_layers=plan.num_stages, hidden_size=SHAPE[2], num_attention_heads=1,
        pipeline_model_parallel_size=plan.num_ranks, virtual_pipeline_model_parallel_size=virtual,
        pipeline_dtype=torch.float32, calculate_per_token_loss=True, deallocate_pipeline_outputs=True,
        overlap_p2p_comm=virtual is not None, batch_p2p_comm=virtual is None, **(COMBINED if is_combined else {}))
    own, rank = Rank(), parallel_state.get_pipeline_model_parallel_rank()
    modules = [TimedModule(config, times, own, is_last=place.stage == plan.num_stages - 1)
               for place in plan.placement[rank]]
    step = combined_forward_step(modules.index) if is_combined else _forward_step
    run = get_forward_backward_func(pp_size=plan.num_ranks, vp_size=virtual)
    longest = torch.zeros(1 + repeats, dtype=torch.float64)
    for number in range(1 + repeats):
        torch.distributed.barrier()
        started = time.perf_counter()
        run(forward_step_func=step, data_iterator=[iter(()) for _ in modules] if virtual else iter(()),
            model=modules if virtual else modules[0], num_microbatches=plan.num_microbatches, seq_length=SHAPE[0],
            micro_batch_size=SHAPE[1], forward_only=False)
        longest[number] = 1000 * (time.perf_counter() - started)
    torch.distributed.all_reduce(longest, op=torch.distributed.ReduceOp.MAX)
    parallel_state.destroy_model_parallel()
    return longest[1:].min().item()
