"""A step's forward and backward passes over a pipeline, behind the interface of Megatron-Core's schedules.

Without a pipeline it is Megatron-Core's own function; with one, a plan run by the executor. What goes between stages is
[S / TP, B, H] in the pipeline's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel.schedules import forward_backward_no_pipelining
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from dsv3_megatron.config.parallel import ParallelConfig
from dsv3_megatron.schedule.execute import Executor
from dsv3_megatron.schedule.plan import Plan, build_plan, forward_plan
from dsv3_megatron.schedule.recorder import ScheduleTrace
from dsv3_megatron.schedule.transport import PipelineChannels
from dsv3_megatron.schedule.whole_stage import ForwardStep, StepResults, WholeStage

ForwardBackward = Callable[..., list[dict[str, Any]]]


def build_forward_backward(parallel: ParallelConfig, groups: ProcessGroupCollection, config: TransformerConfig, *,
                           trace: str | None = None) -> ForwardBackward:
    """The function that takes a step's micro-batches through the stages; called by every rank, for it makes a group.

    Args:
        parallel: The run's; its schedule.
        groups: The run's process groups.
        config: Of the stages; its `finalize_model_grads_func` is called at the end of a step, with the tokens that
            the gradients are to be divided by: those of one whole pipeline, the same on each of its ranks.
        trace: File for what each rank did when in a training step; see `recorder`. Needs a pipeline.

    Returns:
        Takes the arguments of Megatron-Core's forward_backward functions that a run uses.
    """
    if parallel.pipeline_model_parallel_size == 1:
        return forward_backward_no_pipelining
    return PipelineStep(parallel, groups, config, trace=ScheduleTrace(trace) if trace else None)


class PipelineStep:
    """The function that `build_forward_backward` returns for a pipeline."""

    def __init__(self, parallel: ParallelConfig, groups: ProcessGroupCollection, config: TransformerConfig, *,
                 trace: ScheduleTrace | None) -> None:
        self.parallel, self.groups, self.config, self.trace = parallel, groups, config, trace
        self.channels = PipelineChannels(groups)
        self._plans: dict[tuple[int, bool], Plan] = {}
        self._executors: dict[Any, Executor] = {}

    def __call__(self, *, forward_step_func: ForwardStep, data_iterator: Any, model: Any, num_microbatches: int,
                 seq_length: int, micro_batch_size: int, forward_only: bool = False) -> list[dict[str, Any]]:
        """Run a step.

        Args:
            forward_step_func: As of Megatron-Core's functions, with a loss per token.
            data_iterator: Batches of each chunk; not in a list if there is one chunk.
            model: This rank's chunks, likewise.
            num_microbatches: Of the whole pipeline, over both directions of DualPipe.
            seq_length: Tokens of a sequence.
            micro_batch_size: Sequences of a micro-batch.
            forward_only: No backward, and no finishing of gradients.

        Returns:
            The loss function's reports; none on a rank without a last stage.
        """
        modules: list[torch.nn.Module] = list(model) if isinstance(model, list) else [model]
        iterators: list[Iterator[Any]] = data_iterator if isinstance(data_iterator, list) else [data_iterator]
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        executor = self._executor(num_microbatches, seq_length, micro_batch_size, forward_only, device)
        results = StepResults(torch.zeros((), dtype=torch.int32, device=device))
        places = executor.plan.placement[executor.rank]
        runners = [WholeStage(module, forward_step_func, batches, is_first=place.stage == 0,
                              is_last=place.stage == executor.plan.num_stages - 1, results=results,
                              forward_only=forward_only)
                   for module, batches, place in zip(modules, iterators, places, strict=True)]
        if forward_only:
            executor.run(runners)
            return results.reports
        if self.trace is not None and self.trace.is_wanted:
            self.trace.record(executor.plan, self.groups.pp, partial(executor.run, runners))
        else:
            executor.run(runners)
        torch.distributed.all_reduce(results.num_tokens, group=self.groups.pp)
        assert self.config.finalize_model_grads_func is not None
        self.config.finalize_model_grads_func(modules, results.num_tokens)
        return results.reports

    def _executor(self, num_microbatches: int, seq_length: int, micro_batch_size: int, forward_only: bool,
                  device: torch.device) -> Executor:
        """One for each kind of step: plans of many micro-batches take a while to make."""
        key = (num_microbatches, seq_length, micro_batch_size, forward_only)
        if key not in self._executors:
            sizes = {"num_ranks": self.groups.pp.size(), "num_microbatches": num_microbatches}
            if self.parallel.schedule == "interleaved":
                sizes["virtual_stages"] = self.parallel.stages_per_rank
            plan = (forward_plan if forward_only else build_plan)(self.parallel.schedule, **sizes)
            transport = self.channels.transport(
                shape=(seq_length // self.groups.tp.size(), micro_batch_size, self.config.hidden_size),
                dtype=self.config.pipeline_dtype, device=device)
            self._executors[key] = Executor(plan, self.groups.pp.rank(), transport)
        return self._executors[key]
