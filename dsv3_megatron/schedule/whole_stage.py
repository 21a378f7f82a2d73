"""A stage as one piece: a pass is one step, and the backward is not split.

It runs whatever `forward_step_func` Megatron-Core's schedules run. Interim where a schedule splits the backward: the
input part computes the weight gradients too and the weight part finds nothing left to do, so that results are right,
and the time that ZB1P, ZB-V and DualPipe save is not saved.

Shapes: S sequence, B micro-batch, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.utils import get_attr_wrapped_model

from dsv3_megatron.schedule.chunk import Steps

ForwardStep = Callable[[Iterator[Any], torch.nn.Module], tuple[Any, Callable[..., Any]]]


@dataclass
class StepResults:
    """What the last stages of this rank make of a step.

    Attributes:
        num_tokens: Over the micro-batches so far, int32; what the summed loss is to be divided by.
        reports: The loss function's reports, one a micro-batch.
    """

    num_tokens: torch.Tensor
    reports: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class _Saved:
    """What a backward needs: the input, and where the graph of the output, or of the loss, ends."""

    input_SBH: torch.Tensor | None
    end: torch.autograd.graph.GradientEdge


class WholeStage:
    """Runs one stage's module for the executor.

    Args:
        module: The stage, wrapped or not.
        forward_step: Takes a batch from `batches` and the module; returns the output and the loss function.
        batches: This stage's micro-batches, in order.
        is_first: It begins from tokens.
        is_last: Its output becomes the loss.
        results: Takes what the loss function returns.
        forward_only: Keep nothing for a backward.
    """

    def __init__(self, module: torch.nn.Module, forward_step: ForwardStep, batches: Iterator[Any], *, is_first: bool,
                 is_last: bool, results: StepResults, forward_only: bool) -> None:
        self.module, self.forward_step, self.batches = module, forward_step, batches
        self.is_first, self.is_last, self.results, self.forward_only = is_first, is_last, results, forward_only
        self._set_input = get_attr_wrapped_model(module, "set_input_tensor")
        self._saved: dict[int, _Saved] = {}
        self._num_begun = 0

    def forward_steps(self, microbatch: int, input_SBH: torch.Tensor | None) -> Steps:
        """A micro-batch's forward pass; micro-batches come in order, as their batches do."""
        assert microbatch == self._num_begun, "batches are read in order"
        self._num_begun += 1
        yield from ()
        with torch.set_grad_enabled(not self.forward_only):
            if input_SBH is not None:
                input_SBH = input_SBH.detach().requires_grad_(not self.forward_only)
            self._set_input(input_SBH)
            output, loss_function = self.forward_step(self.batches, self.module)
            if self.is_last:
                output, num_tokens, report = loss_function(output)
                self.results.num_tokens += num_tokens
                self.results.reports.append(report)
        if not self.forward_only:
            # The graph's end rather than the output: the output's memory is free once it is sent.
            self._saved[microbatch] = _Saved(input_SBH, torch.autograd.graph.get_gradient_edge(output))
        return None if self.is_last else output.detach()

    def backward_steps(self, microbatch: int, grad_SBH: torch.Tensor | None, *, defer_weights: bool) -> Steps:
        """A micro-batch's whole backward pass."""
        saved = self._saved.pop(microbatch)
        yield from ()
        torch.autograd.backward((saved.end,), None if grad_SBH is None else (grad_SBH,))
        if saved.input_SBH is None:
            return None
        grad, saved.input_SBH.grad = saved.input_SBH.grad, None
        return grad

    def backward_weight(self, microbatch: int) -> None:
        """Nothing is left to do."""
