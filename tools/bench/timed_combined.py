"""Megatron-Core's combined plan on stages of known times.

Its own `TransformerModelChunkSchedulePlan.run` and `TransformerLayerSchedulePlan.run` say what runs when; only the
nodes of a layer are ours. A chunk is one layer: attention, dispatch, experts, combine, with the weight gradients put
off (`delay_wgrad_compute`), which is its best form.

On a GPU the host queues work on two streams that an event per micro-batch and chunk keeps in order. Here an event is
the moment when the last queued work of its chunk ends: compute sleeps, an all-to-all is a timer (`timed_stages.py`)
that starts when its chunk's event and the link allow, however late the host comes to it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.common.model_chunk_schedule_plan import (
    TransformerLayerSchedulePlan,
    TransformerModelChunkSchedulePlan,
)
from megatron.core.pipeline_parallel.utils import NoopScheduleNode

from tools.bench.timed_stages import SHAPE, ChunkTimes, Rank


class WorkEnd:
    """When the queued work of one micro-batch on one chunk ends, with the calls of a CUDA event."""

    def __init__(self, rank: Rank) -> None:
        self.rank = rank
        self.moment = rank.now()

    def wait(self, _stream: Any = None) -> None:
        """A stream waits for it; as streams are in order, so may the host."""
        self.rank.wait(self.moment)

    def record(self, _stream: Any = None) -> None:
        """All work queued so far has been waited for."""
        self.moment = self.rank.now()


class ComputeNode:
    """Attention or experts: half of a pass's compute."""

    def __init__(self, end: WorkEnd, times: ChunkTimes) -> None:
        self.end, self.times = end, times

    def _compute(self, seconds: float) -> None:
        self.end.wait()
        self.end.rank.compute(seconds)
        self.end.record()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The output, empty of content."""
        self._compute(self.times.forward / 2)
        return hidden

    def backward(self, grad: torch.Tensor) -> torch.Tensor:
        """The part for the input."""
        self._compute(self.times.input_part / 2)
        return grad

    def backward_dw(self) -> None:
        """The part for the weights. Nobody waits for it: it takes the processor, not the event."""
        self.end.rank.compute(self.times.weight / 2)


class TransferNode:
    """Dispatch or combine: half of a pass's all-to-all, beside whatever the processor does."""

    def __init__(self, end: WorkEnd, times: ChunkTimes) -> None:
        self.end, self.times = end, times

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Queued; its end is the event."""
        self.end.moment = self.end.rank.transfer(self.times.transfer / 2, ready=self.end.moment)
        return rows

    backward = forward


class TimedLayerPlan(TransformerLayerSchedulePlan):
    """One layer of known times."""

    def __init__(self, config: Any, end: WorkEnd, times: ChunkTimes) -> None:
        self.config = config
        self.pre_dispatch_computation, self.mlp = ComputeNode(end, times), ComputeNode(end, times)
        self.moe_dispatch, self.moe_combine = TransferNode(end, times), TransferNode(end, times)
        self.mtp_post_process = NoopScheduleNode()

    def get_low_precision_context(self) -> contextlib.AbstractContextManager[None]:
        """None."""
        return contextlib.nullcontext()


class InputNode:
    """Where a chunk's input enters and its gradient leaves."""

    def __init__(self, given: torch.Tensor | None) -> None:
        self.given = given

    def forward(self) -> torch.Tensor:
        """A new output, for the loss to be taken of."""
        return torch.zeros(SHAPE, requires_grad=True)

    def backward(self, grad: torch.Tensor) -> None:
        """To the input, if a rank waits for it."""
        if self.given is not None:
            self.given.grad = torch.zeros(SHAPE)


class TimedChunkPlan(TransformerModelChunkSchedulePlan):
    """One micro-batch on one chunk."""

    def __init__(self, config: Any, given: torch.Tensor | None, times: ChunkTimes, rank: Rank, chunk: int) -> None:
        self._event = WorkEnd(rank)
        self._transformer_layers = [TimedLayerPlan(config, self._event, times)]
        self.pre_process: InputNode | None = InputNode(given)
        self.post_process = None
        self.vp_stage = chunk

    def release_state(self) -> None:
        """Nothing of the model is held."""
        self.pre_process = None


def combined_forward_step(chunk_of: Callable[[Any], int]) -> Callable[..., tuple[TimedChunkPlan, Any]]:
    """The function that Megatron-Core's schedules call for a plan.

    Args:
        chunk_of: Number of a `TimedModule` among its rank's.
    """
    def step(_batches: Any, module: Any, *, return_schedule_plan: bool) -> tuple[TimedChunkPlan, Any]:
        assert return_schedule_plan
        plan = TimedChunkPlan(module.config, module.input, module.times, module.rank, chunk_of(module))
        return plan, lambda output: (output.sum(), torch.tensor(1), {})

    return step
