"""One stage of the model as a pipeline's executor runs it: forward, backward for inputs, backward for weights.

Implements `ChunkRunner` of `parallel/chunk_runner.py` on a stage wrapped as in `model/build.py`. The wrappers' own
forward passes are not called: they cast a first stage's float inputs and a last stage's outputs, and there are none
(tokens; fp32 losses). Gradients accumulate as in an ordinary backward pass, in `main_grad` by the modules or by the
wrapper's hooks on parameters. A parameter that is used twice on a stage (the embedding under MTP, the head) is
accumulated at each use instead of being summed first in its own precision; the wrapper's hooks that start a reduction
when a gradient is ready must stay off. `buckets.py` starts reductions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.utils import unwrap_model

from dsv3_megatron.config.data import DataConfig
from dsv3_megatron.data.batches import Batch
from dsv3_megatron.model.language_model import DeepSeekV3Model, TokenLosses
from dsv3_megatron.model.packed_documents import packed_documents
from dsv3_megatron.model.stage.segments import SegmentedStage
from dsv3_megatron.model.stage.tape import Tape, Value
from dsv3_megatron.parallel.chunk_runner import Steps
from dsv3_megatron.parallel.exchange import PostAllToAll, post_all_to_all

# A micro-batch and its token losses to: the sum to differentiate, the number of tokens, what to report.
LossFunction = Callable[[Batch, TokenLosses], tuple[torch.Tensor, torch.Tensor, dict[str, Any]]]


class ModelChunk:
    """A stage in pieces. Between its calls it keeps, of each micro-batch, what autograd saved and what waits.

    Args:
        stage: DeepSeekV3Model, wrapped or not.
        batch_of: A micro-batch by its number, on the stage's device; called once for each forward pass.
        data: Data configuration of the run: whether documents are kept apart.
        loss_function: Loss of a batch and its token losses; called on the last stage.
        post: Starts an all-to-all.
    """

    def __init__(self, stage: torch.nn.Module, *, batch_of: Callable[[int], Batch], data: DataConfig,
                 loss_function: LossFunction, post: PostAllToAll = post_all_to_all) -> None:
        self.stage = stage
        module: DeepSeekV3Model = unwrap_model(stage)
        self._segments, self._config = SegmentedStage(module), module.config
        self._is_first, self._is_last = module.pre_process, module.post_process
        self._batch_of, self._data, self._loss_function, self._post = batch_of, data, loss_function, post
        # (tape, input, output) of micro-batches between forward and backward; tapes between backward and weights.
        self._forwarded: dict[int, tuple[Tape, Value | None, Value]] = {}
        self._waiting: dict[int, Tape] = {}
        self._reports: list[dict[str, Any]] = []
        self._num_tokens: torch.Tensor | None = None

    def forward_steps(self, microbatch: int, input_SBH: torch.Tensor | None) -> Steps:
        """A micro-batch's forward pass; without gradients (`torch.no_grad`) nothing is kept but its report.

        Args:
            microbatch: Number of a micro-batch that is not yet under way here.
            input_SBH: The previous stage's output; None on the first stage. Must not change before backward is done.

        Returns:
            The stage's output, without history and not kept; None on the last stage.

        Raises:
            RuntimeError: The micro-batch's last forward pass has not gone backward.
        """
        if microbatch in self._forwarded or microbatch in self._waiting:
            raise RuntimeError(f"microbatch={microbatch} is under way on this chunk; run its backward pass, weights "
                               "included, before its number is used again")
        assert (input_SBH is None) == self._is_first, "only the first stage has no input"
        batch = self._batch_of(microbatch)
        tape = Tape(is_recording=torch.is_grad_enabled(), post=self._post)
        given = None if input_SBH is None else tape.value(input_SBH)
        output = yield from self._segments.forward(
            tape, given, batch, packed_documents(batch, self._data), lambda losses: self._loss(batch, losses))
        if tape.is_recording:
            # Of input and output, backward needs the slots alone.
            empty = output.tensor.new_empty(0)
            self._forwarded[microbatch] = (
                tape, None if given is None else Value(empty, given.slot), Value(empty, output.slot))
        return None if self._is_last else output.tensor

    def _loss(self, batch: Batch, losses: TokenLosses) -> torch.Tensor:
        loss, num_tokens, report = self._loss_function(batch, losses)
        self._reports.append(report)
        self._num_tokens = num_tokens if self._num_tokens is None else self._num_tokens + num_tokens
        return loss

    def backward_steps(self, microbatch: int, grad_SBH: torch.Tensor | None, *, defer_weights: bool) -> Steps:
        """A micro-batch's backward pass.

        Args:
            microbatch: Number of a micro-batch whose forward pass is done.
            grad_SBH: The gradient of the stage's output; None on the last stage, whose loss has 1.
            defer_weights: All weight gradients wait for `backward_weight`. Otherwise they are computed here behind the
                transfers, and those of the first segment wait, which has no transfer before it.

        Returns:
            The gradient of the stage's input; None on the first stage.

        Raises:
            RuntimeError: The micro-batch has not gone forward.
        """
        if microbatch not in self._forwarded:
            raise RuntimeError(f"microbatch={microbatch} has no forward pass on this chunk to go back through; under "
                               f"way are {sorted(self._forwarded)}")
        assert (grad_SBH is None) == self._is_last, "only the last stage has no gradient of its output"
        tape, given, output = self._forwarded.pop(microbatch)
        if output.slot is not None:
            output.slot.add(self._loss_grad(output) if grad_SBH is None else grad_SBH)
        del output, grad_SBH
        yield from tape.backward(defer_weights=defer_weights)
        self._waiting[microbatch] = tape
        return given.slot.take() if given is not None and given.slot is not None else None

    def _loss_grad(self, loss: Value) -> torch.Tensor:
        one = torch.ones((), dtype=loss.tensor.dtype, device=loss.tensor.device)
        scale = self._config.grad_scale_func
        return one if scale is None else scale(one)

    def backward_weight(self, microbatch: int) -> None:
        """Compute what `backward_steps` left, and free it.

        Raises:
            RuntimeError: There was no such pass, or it is complete.
        """
        if microbatch not in self._waiting:
            raise RuntimeError(f"microbatch={microbatch} has no weight gradients that wait on this chunk; there are "
                               f"those of {sorted(self._waiting)}")
        self._waiting.pop(microbatch).weights.compute()

    def take_reports(self) -> tuple[torch.Tensor, list[dict[str, Any]]]:
        """The number of tokens and the reports of the forward passes since the last call, in their order.

        0 and none but on the last stage.
        """
        reports, self._reports = self._reports, []
        num_tokens, self._num_tokens = self._num_tokens, None
        return torch.zeros((), dtype=torch.int) if num_tokens is None else num_tokens, reports
